"""GPUs, fake ones, behind the real daemon and the real preloader: pins, swaps, deaths, handoffs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpukit
import pytest
from gpukit import MIB
from kit import BIN, NodeKit, eventually, write_model

from cached import CachedError, fds
from cached.client import rpc
from cached.v1 import model_cache_pb2 as pb
from cached.v1.model_cache_pb2_grpc import ModelCacheStub

CONFIG = """
[store]
keep_free = 0.0
[standby]
gpu_reserve_bytes = "1 MiB"
claimed_grace_s = 1
"""


@dataclass
class GpuNode:
    """A node with two fake GPUs."""

    node: NodeKit
    gpus: gpukit.Gpus
    root: Path

    def __post_init__(self) -> None:
        self.devices = [f"cuda:{self.gpus.add()}", f"cuda:{self.gpus.add()}"]
        self.refs = []
        for seed in range(3):
            write_model(self.root / f"m{seed}", 20 * MIB, seed=seed)
            self.refs.append(f"file://{self.root}/m{seed}/")

    def serve(self) -> None:
        (self.root / "cached.toml").write_text(CONFIG)
        self.node.serve("--config", str(self.root / "cached.toml"), with_preloader=False)

    def preload(self) -> None:
        command = [str(BIN / "preloader"), "serve", "--run-dir", str(self.node.run_dir)]
        command += ["--data-dir", str(self.node.data_dir), "--dev-dir", str(self.gpus.dev)]
        with (self.root / "preloader.log").open("ab") as log:
            self.node.preloader = subprocess.Popen(command, stderr=log, env=self.gpus.env())

    def kill_preloader(self) -> None:
        assert self.node.preloader is not None
        for pid in [self.node.preloader.pid, *self.node.processes("preloader.")]:
            os.kill(pid, signal.SIGKILL)
        self.node.preloader.wait()

    def stands(self, ref: str, device: str) -> bool:
        return device in self.node.row(ref).get("devices", [])

    def loads(self) -> float:
        loads = self.node.metrics()
        return sum(
            count for name, count in loads.items() if name.startswith('cached_loads_total{device="cuda')
        )

    def free_bytes(self, number: int) -> int:
        places = json.loads(self.node.ctl("status", "-o", "json").stdout)["places"]
        return next(p["gpu"]["free_bytes"] for p in places if p["device"] == self.devices[number])

    def handed(self, ref: str, **more: Any) -> tuple[dict[str, Any], list[int]]:
        """What a replica with GPU 0 gets: the handoff's header, and descriptors that are the caller's."""
        request = pb.AcquireRequest(ref=ref, **{"device": "disk", "prefers": [self.devices[0]]} | more)
        with rpc.connect(rpc.resolve_address(self.node.run_dir)) as channel:
            grant = list(ModelCacheStub(channel).Acquire(request, timeout=30))[-1].grant
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(str(self.node.run_dir / "replicas/handoff.sock"))
            fds.send(connection, {"token": grant.token})
            header, received = fds.receive(connection)
        assert (header["device"], len(received)) == (grant.device, 2 + grant.blobs)
        return header, received


@pytest.fixture
def node(cold_node: NodeKit, tmp_path: Path) -> Iterator[GpuNode]:
    with gpukit.machine() as gpus:
        made = GpuNode(cold_node, gpus, tmp_path)
        made.serve()
        made.preload()
        eventually(lambda: "cuda:1" in cold_node.ctl("status").stdout)
        yield made
        cold_node.close()
        print((tmp_path / "preloader.log").read_text()[-4000:])


def test_what_is_pinned_on_a_gpu_outlives_every_death_but_the_machines(node: GpuNode) -> None:
    ref, (first, second) = node.refs[0], node.devices
    refused = node.node.ctl("pin", ref, "--on", "cuda:0", "--wait", code=1)
    assert "--unclaimed" in refused.stderr
    there = node.node.ctl("pin", ref, "--on", "cuda:0", "--unclaimed", "--wait")
    assert first in there.stdout and node.stands(ref, first)
    assert node.node.ctl("pin", ref, "--on", "cuda:7", code=3).stderr.count("NVIDIA") == 0
    loads = node.loads()
    assert loads == 1 and node.free_bytes(0) <= 44 * MIB
    for _ in range(2):
        node.kill_preloader()
        eventually(lambda: not node.stands(ref, first))
        assert node.gpus.used_bytes(first.removeprefix("cuda:")) >= 20 * MIB  # the daemon has it
        node.preload()
        eventually(lambda: node.stands(ref, first))
        assert node.loads() == loads
    node.node.kill_daemon()
    node.serve()
    eventually(lambda: node.stands(ref, first))
    assert node.loads() == 0
    header, (lease, index, layout, *blocks) = node.handed(ref)
    assert header["device"] == first and blocks
    assert json.loads(os.pread(layout, 2**20, 0))["id"] == header["id"]
    eventually(lambda: node.node.model(ref).residencies[0].hits == 1)

    # One command puts another in its place; what left stays where it was besides.
    swap = ("swap", ref, node.refs[1], "--on", "cuda:0", "--wait")
    node.node.ctl(*swap)
    node.node.ctl(*swap)  # done already: the pin stays what it is
    assert "also on unclaimed GPUs" in node.node.ctl("show", node.refs[1]).stdout
    assert "is not pinned" in node.node.ctl("swap", node.refs[2], ref, "--on", "cuda:0", code=3).stderr
    assert "--wait" in node.node.ctl("swap", node.refs[1], node.refs[2], "--on", "cuda:0", code=1).stderr
    assert node.stands(node.refs[1], first) and node.stands(ref, first)  # somebody has it yet
    for fd in (lease, index, layout, *blocks):
        os.close(fd)
    eventually(lambda: not node.stands(ref, first))
    assert node.node.row(ref)["claims"] == []
    node.node.ctl("pin", node.refs[2], "--on", "cuda:any", "--copies", "2", "--unclaimed", "--wait")
    assert node.stands(node.refs[2], first) and node.stands(node.refs[2], second)

    # An engine gets room before it starts: idle models leave for it, and what cannot be had is said at once.
    for bad, reason in (
        ({"room_device": "cuda:0", "room_bytes": 2**40}, "NO_ROOM"),
        ({"room_device": "cuda:9", "room_bytes": 1}, "NO_SUCH_DEVICE"),
        ({"room_bytes": 1}, "BAD_ROOM"),
        ({"prefers": ["cuda:any"]}, "BAD_DEVICE"),
        ({"prefers": ["host"] * 9}, "TOO_MANY_DEVICES"),
    ):
        with pytest.raises(CachedError) as caught:
            node.handed(ref, **bad)
        assert caught.value.reason == reason
    header, received = node.handed(ref, room_device="cuda:0", room_bytes=50 * MIB)
    assert node.free_bytes(0) >= 50 * MIB and header["device"] == "disk"
    for fd in received:
        os.close(fd)

    said = node.node.ctl(
        "run", ref, "--room", "50MiB", "--room-on", first, "--", "sh", "-c", "echo $MODEL_ID"
    )
    assert said.stdout.strip() == node.node.row(ref)["id"]
    told = node.node.ctl("run", ref, "--room", "1GB", "--room-on", first, "--", "true", code=5).stderr
    assert "cannot be made free" in told and "67.11 MB" in told

    # A GPU that falls ill gives up what it has, and says why.
    node.gpus.xid(second.removeprefix("cuda:"), 79)
    eventually(lambda: not node.stands(node.refs[2], second))
    assert "unfit" in node.node.ctl("status").stdout
    eventually(lambda: node.node.metrics()[f'cached_gpu_unfit{{device="{second}"}}'] == 1)
