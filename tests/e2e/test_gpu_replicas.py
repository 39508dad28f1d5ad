"""Replicas on GPUs, fake ones: one copy for all of them, through every death of ours, room, and illness.

The GPUs are fakes (tests/fakegpu): they behave as the driver and NVML do across processes, on memory of the
host. Nothing here says anything of a real device.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from gpukit import MIB
from gpunode import GpuNode, end, reads, running
from kit import eventually, said

GPU_BYTES = 96 * MIB
MODEL_BYTES = 12 * MIB
CONFIG = "[store]\nkeep_free = 0.0\n[standby]\ngpu_reserve_bytes = '8 MiB'\n"


@pytest.fixture
def node(tmp_path: Path) -> Iterator[GpuNode]:
    with running(tmp_path, GPU_BYTES, CONFIG) as node:
        yield node


def copies(node: GpuNode, number: int) -> int:
    """How many times a model of the usual size is there, beside each process's own context."""
    return node.gpus.used_bytes(node.uuids[number]) // MODEL_BYTES


def test_one_copy_serves_all_replicas_and_outlives_every_process_of_ours(node: GpuNode) -> None:
    ref, digest = node.model(1, MODEL_BYTES)
    node.pin(ref, "cuda:0")
    first, second = node.replica(ref, on="cuda:0"), node.replica(ref, on="auto")
    assert said(first) == said(second) == node.device(0)
    assert reads(first) == reads(second) == digest
    assert node.loads(0) == 1 and copies(node, 0) == 1

    node.kit.kill_preloader()
    node.preload()
    node.await_standing(ref, 0)
    node.kit.kill_daemon()
    node.serve()
    node.await_standing(ref, 0)
    # An upgrade: one after the other, and the old one is dead before the new one starts.
    assert node.kit.stop_preloader() == 0
    node.preload()
    node.await_standing(ref, 0)
    assert node.kit.stop_daemon() == 0
    node.serve()
    node.await_standing(ref, 0)

    third = node.replica(ref, on="cuda:0")
    assert said(third) == node.device(0)
    assert reads(first) == reads(second) == reads(third) == digest
    assert node.loads(0) == 0 and copies(node, 0) == 1

    node.kit.ctl("unpin", ref)
    end(first, second, third)
    eventually(lambda: not node.kit.leases(ref))
    node.kit.ctl("evict", ref)
    eventually(lambda: node.gpus.used_bytes(node.uuids[0]) == 0)


def test_an_engine_gets_room_and_an_ill_gpu_is_left(node: GpuNode) -> None:
    cold, _ = node.model(1, 32 * MIB)
    warm, digest = node.model(2, 32 * MIB)
    node.pin(cold, "cuda:0")
    node.pin(warm, "cuda:0")
    engine = node.replica(warm, on="cuda:0", room_bytes=40 * MIB)
    assert said(engine) == node.device(0) and reads(engine) == digest
    assert node.stands(warm, 0) and not node.stands(cold, 0)
    greedy = said(node.replica(warm, on="cuda:0", room_bytes=90 * MIB))
    assert greedy.startswith("NO_ROOM") and "94.37 MB" in greedy, greedy

    moving, digest = node.model(3, MODEL_BYTES)
    node.pin(moving, "cuda:any")
    assert node.stands(moving, 1)  # no load begins beside an engine that is starting
    node.gpus.ecc(node.uuids[1])
    eventually(lambda: not node.stands(moving, 1))
    assert "ECC" in node.kit.ctl("status").stdout
    replica = node.replica(moving, on="cuda:1")
    assert said(replica) == "host" and reads(replica) == digest
