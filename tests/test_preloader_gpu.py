"""The preloader's parent on a machine with (fake) GPUs: what it finds, keeps, hands out and gives back."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gpukit
import grpc
import pytest
from fillerkit import put_tensors, tensors_on
from gpukit import KIB, MIB
from residentkit import content

from cached import fds
from cached.cuda import Driver
from cached.model import CachedError, Device, ErrorKind, Gpu, Manifest
from preloader.filling import Filler
from preloader.keeper import Keeper
from preloader.layout import read_layout
from preloader.standing import ANYBODY, NOBODY, LoadCancelled
from preloader.v1 import standby_pb2, standby_pb2_grpc
from preloader.wire import parse_layout

PATIENCE_S = 20.0
A, B, C = content(5 * MIB, 1), content(20 * MIB, 2), content(3 * MIB, 3)
SIZES = (1000, 300_000, 7)


@pytest.fixture
def gpus() -> Iterator[gpukit.Gpus]:
    with gpukit.machine() as made:
        yield made


@pytest.fixture
def two(gpus: gpukit.Gpus) -> Manifest:
    """Two files with tensors, the second larger than a chunk, and one without."""
    files = {"a": (A, SIZES), "b": (B, SIZES), "config": (b"{}", ())}
    return put_tensors(gpus.directory / "data", files)


@pytest.fixture
def other(gpus: gpukit.Gpus) -> Manifest:
    """Shares a file with the first."""
    return put_tensors(gpus.directory / "data", {"b": (B, SIZES), "c": (C, SIZES)})


def eventually(happens: Callable[[], bool], within_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + within_s
    while not happens():
        assert time.monotonic() < deadline, f"it did not happen within {within_s} s"
        time.sleep(0.02)


def quiet(done: int, total: int) -> None:
    pass


def close_all(descriptors: tuple[int, ...] | list[int]) -> None:
    for fd in descriptors:
        os.close(fd)


# --- the real processes ---------------------------------------------------------------------------


class Standby:
    """One device's sockets, as the daemon uses them."""

    def __init__(self, sockets: Path, uuid: str) -> None:
        self.path = sockets / f"cuda-{uuid}.sock"
        self._fds_path = sockets / f"cuda-{uuid}.fds.sock"

    @contextlib.contextmanager
    def stub(self) -> Iterator[standby_pb2_grpc.StandbyStub]:
        eventually(self._answers)  # a killed parent's sockets are still there
        with grpc.insecure_channel(f"unix:{self.path}") as channel:
            yield standby_pb2_grpc.StandbyStub(channel)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as connection:
            return connection.connect_ex(str(self.path)) == 0

    def inventory(self) -> standby_pb2.Inventory:
        with self.stub() as stub:
            return next(stub.Watch(standby_pb2.WatchRequest(), timeout=PATIENCE_S))

    def reason(self) -> str:
        return self.inventory().gpu.unfit_reason

    def residents(self) -> list[str]:
        return [resident.artifact_id for resident in self.inventory().residents]

    def load(self, manifest: Manifest) -> list[int]:
        """What it said of its progress, in bytes."""
        with self.stub() as stub:
            request = standby_pb2.LoadRequest(artifact_id=manifest.id)
            *told, done = stub.Load(request, timeout=PATIENCE_S)
        assert done.done.artifact_id == manifest.id
        return [event.progress.bytes_total for event in told]

    def release(self, manifest: Manifest) -> None:
        with self.stub() as stub:
            stub.Release(standby_pb2.ReleaseRequest(artifact_id=manifest.id), timeout=PATIENCE_S)

    def ask(self, request: dict[str, object], sent: list[int] = []) -> tuple[dict, list[int]]:  # noqa: B006
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE_S)
            eventually(lambda: connection.connect_ex(str(self._fds_path)) == 0)
            fds.send(connection, request, tuple(sent))
            return fds.receive(connection)

    def header(self, request: dict[str, object], sent: list[int] = []) -> dict:  # noqa: B006
        header, received = self.ask(request, sent)
        close_all(received)
        return header


class Preloader:
    def __init__(self, gpus: gpukit.Gpus, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.sockets = gpus.directory / "run/standby"

    def on(self, uuid: str) -> Standby:
        return Standby(self.sockets, uuid)

    def devices(self) -> set[str]:
        names = {path.stem.removeprefix("cuda-") for path in self.sockets.glob("cuda-*.sock")}
        return {name for name in names if not name.endswith(".fds")}

    def child(self, module: str) -> int | None:
        """A child's pid, found among all processes."""
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (path / "cmdline").read_bytes().split(b"\0")
                parent = (path / "stat").read_text().rpartition(")")[2].split()[1]
                if parent == str(self.process.pid) and module.encode() in words:
                    return int(path.name)
        return None


@contextlib.contextmanager
def preloader(gpus: gpukit.Gpus, *more: str) -> Iterator[Preloader]:
    folder = gpus.directory
    command = [sys.executable, "-m", "preloader", "serve", "--devices", "cuda:all", *more]
    command += ["--run-dir", str(folder / "run"), "--data-dir", str(folder / "data")]
    with (folder / "log").open("a") as log:
        process = subprocess.Popen([*command, "--dev-dir", str(gpus.dev)], env=gpus.env(), stderr=log)
    try:
        yield Preloader(gpus, process)
    finally:
        process.terminate()
        process.wait(PATIENCE_S)
        print((folder / "log").read_text())


def test_standbys_come_and_go_with_their_devices(gpus: gpukit.Gpus) -> None:
    plain, parent = gpus.add(), gpus.add()
    instance = gpus.add_instance(parent)
    with preloader(gpus) as running:
        eventually(lambda: running.devices() == {plain, instance})
        assert {oct(path.stat().st_mode & 0o777) for path in running.sockets.glob("*.sock")} == {"0o600"}
        told = running.on(instance).inventory()
        assert (told.device, told.pid) == (f"cuda:{instance}", running.process.pid)
        assert (told.gpu.index, told.gpu.name, told.gpu.total_bytes) == (1, "Fake H200 MIG 1g", 16 * MIB)
        late = gpus.add()
        eventually(lambda: running.devices() == {plain, instance, late})
        with running.on(plain).stub() as stub:
            watch = stub.Watch(standby_pb2.WatchRequest(), timeout=PATIENCE_S)
            next(watch)
            gone = gpus.vanish(plain)
            eventually(lambda: next(watch).gpu.unfit_reason.startswith("NVML:"))
            with pytest.raises(grpc.RpcError):
                list(watch)
        eventually(lambda: running.devices() == {instance, late})
        gpus.come_back(gone)
        eventually(lambda: running.devices() == {plain, instance, late})
        assert running.on(plain).reason() == ""
    assert running.process.returncode == 0 and not running.devices()


def test_a_node_without_gpus_has_no_more_than_it_needs(tmp_path: Path) -> None:
    folders = ["--run-dir", str(tmp_path), "--data-dir", str(tmp_path)]
    environment = {key: value for key, value in os.environ.items() if key != "FAKE_GPU_DIR"}
    environment["PYTHONPATH"] = os.pathsep.join([str(gpukit.FAKES), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "preloader", "serve", "--devices", "cuda:all", *folders]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "preloader runs" in process.stderr.readline()
        said = json.loads(process.stderr.readline())
        assert said["event"] == "nothing tells of GPUs" and "LIBRARY_NOT_FOUND" in said["why"]
        assert "grpc" not in Path(f"/proc/{process.pid}/maps").read_text()
        process.terminate()


def test_only_the_devices_that_were_asked_for(gpus: gpukit.Gpus) -> None:
    _, by_index, parent = gpus.add(), gpus.add(), gpus.add()
    instances = {gpus.add_instance(parent), gpus.add_instance(parent)}
    with preloader(gpus, "--devices", f"cuda:1,cuda:{parent}") as running:
        eventually(lambda: running.devices() == {by_index, *instances})
        time.sleep(0.5)
        assert running.devices() == {by_index, *instances}


def test_from_load_to_release(gpus: gpukit.Gpus, two: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    uuid = gpus.add()
    with preloader(gpus) as running:
        standby = running.on(uuid)
        assert set(standby.load(two)) <= {0, len(A) + len(B)}
        eventually(lambda: standby.inventory().gpu.free_bytes == 64 * MIB - gpus.used_bytes(uuid))
        (resident,) = standby.inventory().residents
        assert (resident.artifact_id, resident.bytes, resident.locked) == (
            two.id,
            gpus.used_bytes(uuid),
            True,
        )

        header, received = standby.ask({"id": two.id, "uid": 1000})
        assert (header["id"], header["uid"]) == (two.id, 1000)
        layout = read_layout(received[0])
        assert (layout.artifact, layout.device, layout.granularity_bytes) == (
            two.id,
            f"cuda:{uuid}",
            64 * KIB,
        )
        with pytest.raises(PermissionError):
            os.pwrite(received[0], b"x", 0)
        monkeypatch.setenv("FAKE_GPU_DIR", str(gpus.directory))
        (gpu,), blocks = Driver().gpus(), received[1:]
        for blob, data in zip(layout.words()["blobs"], (A, B), strict=True):
            own, blocks = blocks[: len(blob["blocks"])], blocks[len(blob["blocks"]) :]
            assert b"".join(tensors_on(gpu, parse_layout(blob), own).values()) == data[8:]
        assert not blocks
        close_all(received)

        assert standby.header({"id": two.id})["uid"] == 1000
        standby.release(two)
        assert gpus.used_bytes(uuid) == 0 and standby.residents() == []
        header = standby.header({"id": two.id, "uid": 1000})
        assert header["error"]["reason"] == "NOT_RESIDENT"


def test_an_ill_device_holds_nothing(gpus: gpukit.Gpus, two: Manifest) -> None:
    well, parent, third = gpus.add(), gpus.add(), gpus.add()
    instance = gpus.add_instance(parent, total_bytes=48 * MIB)
    with preloader(gpus) as running:
        running.on(instance).load(two)
        gpus.xid(parent, 31)  # a program's own fault
        gpus.fail("nvmlDeviceGetMemoryInfo", "NVML_ERROR_UNKNOWN", times=8)
        time.sleep(1.0)
        assert running.on(instance).residents() == [two.id]
        gpus.xid(parent, 79, instance=1)
        eventually(lambda: running.on(instance).residents() == [])
        assert running.on(instance).reason() == "XID 79: the GPU has fallen off the bus"
        with pytest.raises(grpc.RpcError) as caught:
            running.on(instance).load(two)
        assert dict(caught.value.trailing_metadata())["cached-reason"] == "GPU_UNFIT"
        assert "XID 79" in caught.value.details()
        assert running.on(instance).header({"id": two.id})["error"]["reason"] == "GPU_UNFIT"
        eventually(lambda: gpus.used_bytes(instance) == 0)

        inventory = running.child("preloader.inventory")
        assert inventory is not None
        os.kill(inventory, signal.SIGKILL)
        gpus.ecc(third, uncorrected=2)  # perhaps before the next one looks for the first time
        eventually(lambda: running.child("preloader.inventory") not in (None, inventory))
        time.sleep(1.0)
        gpus.ecc(third, uncorrected=3)
        eventually(lambda: running.on(third).reason().startswith("ECC: "))
        assert running.on(instance).reason().startswith("XID 79") and running.on(well).reason() == ""


def test_what_stands_outlasts_a_parent_that_may_open_no_more_files(gpus: gpukit.Gpus, two: Manifest) -> None:
    uuid = gpus.add()
    with preloader(gpus) as running:
        standby, pid = running.on(uuid), running.process.pid
        standby.load(two)
        limit = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        few = len(os.listdir(f"/proc/{pid}/fd")), limit[1]
        resource.prlimit(pid, resource.RLIMIT_NOFILE, few)
        child = running.child("preloader.inventory")
        assert child is not None
        os.kill(child, signal.SIGKILL)
        eventually(lambda: "child does not start" in (gpus.directory / "log").read_text())
        gpus.fail("nvmlDeviceGetHandleByIndex", "NVML_ERROR_UNKNOWN", times=2)  # nor one that NVML misses
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limit)
        eventually(lambda: not (gpus.directory / "fail/nvmlDeviceGetHandleByIndex").exists())
        time.sleep(0.5)
        assert standby.residents() == [two.id]


def test_a_successor_takes_what_the_daemon_kept(gpus: gpukit.Gpus, two: Manifest) -> None:
    """With the device's node, which the daemon keeps too; without, the driver frees the memory."""
    uuid = gpus.add()
    with preloader(gpus) as first:
        first.on(uuid).load(two)
        _, kept = first.on(uuid).ask({"id": two.id, "uid": 1000})
        _, (node,) = first.on(uuid).ask({"node": True})
        first.process.kill()
        first.process.wait(PATIENCE_S)
        before = gpus.used_bytes(uuid)
    with preloader(gpus) as second:
        standby = second.on(uuid)
        assert standby.residents() == []
        header = standby.header({"adopt": two.id, "uid": 1000}, kept[:-1])
        assert header["error"]["reason"] == "BAD_LAYOUT"
        assert standby.header({"adopt": two.id, "uid": 1000}, kept)["adopted"] is True
        assert standby.residents() == [two.id] and standby.header({"id": two.id})["uid"] == 1000
        assert set(standby.load(two)) == {0}  # it is there
        close_all(kept)
        assert gpus.used_bytes(uuid) == before
        _, kept = standby.ask({"id": two.id})
        second.process.kill()
        second.process.wait(PATIENCE_S)
    os.close(node)
    eventually(lambda: gpus.used_bytes(uuid) == 0)
    with preloader(gpus) as third:
        header = third.on(uuid).header({"adopt": two.id, "uid": NOBODY}, kept)
        assert header["error"]["reason"] == "GPU_MEMORY_LOST" and third.on(uuid).residents() == []
        close_all(kept)


# --- the keeper, with real fillers ------------------------------------------------------------------


class Kept:
    """A keeper in this process, told of its device's memory as the inventory would."""

    def __init__(self, gpus: gpukit.Gpus, uuid: str, stack: contextlib.ExitStack) -> None:
        self.gpus, self.uuid, self.unfit_reason = gpus, uuid, ""
        command = [sys.executable, "-m", "preloader.filler", "--device", f"cuda:{uuid}"]
        command += ["--data-dir", str(gpus.directory / "data"), "--block-bytes", str(4 * MIB)]
        filler = Filler(tuple(command), {**gpus.env(), "CUDA_VISIBLE_DEVICES": uuid})
        self.keeper = Keeper(Device(f"cuda:{uuid}"), filler, self.gpu(), 0, release_wait_s=0.5)
        self._ended = threading.Event()
        telling = threading.Thread(target=self._tell)
        node = os.open(gpus.dev / "nvidia0", os.O_RDONLY)
        stack.callback(os.close, node)
        stack.callback(self.keeper.close)
        stack.callback(telling.join)
        stack.callback(self._ended.set)
        telling.start()

    def gpu(self) -> Gpu:
        used = self.gpus.used_bytes(self.uuid)
        return Gpu(0, "x", 64 * MIB, 64 * MIB - used, unfit_reason=self.unfit_reason)

    def _tell(self) -> None:
        while not self._ended.wait(0.02):
            self.keeper.update(self.gpu(), self.gpus.used_bytes(self.uuid))

    def load(self, manifest: Manifest, on_progress: Callable[[int, int], None] = quiet) -> None:
        self.keeper.load(manifest.id, on_progress, threading.Event())

    def residents(self) -> set[str]:
        return {resident.artifact for resident in self.keeper.inventory().residents}

    def outside_bytes(self) -> int:
        gpu = self.keeper.inventory().gpu
        assert gpu is not None
        return gpu.outside_bytes


@pytest.fixture
def kept(gpus: gpukit.Gpus) -> Iterator[Kept]:
    uuid = gpus.add()
    with contextlib.ExitStack() as stack:
        yield Kept(gpus, uuid, stack)


def image_bytes(*sizes: int) -> int:
    return sum(-(-size // (64 * KIB)) * 64 * KIB for size in sizes)


def test_what_two_share_stands_once_and_is_held_outside_until_it_is_free(
    kept: Kept, two: Manifest, other: Manifest
) -> None:
    totals: set[int] = set()
    kept.load(two)
    kept.load(other, lambda done, total: totals.add(total))
    assert totals == {len(C)}
    shared = kept.gpus.used_bytes(kept.uuid)
    assert len(A) + len(B) + len(C) <= shared < len(A) + len(B) + len(C) + MIB
    _, mapped = kept.keeper.descriptors(two.id, 1000)
    with pytest.raises(CachedError) as caught:
        kept.keeper.release(two.id)
    problem = caught.value.problem
    assert (problem.reason, problem.temporary) == ("HELD_OUTSIDE", True)
    assert kept.residents() == {other.id}
    assert len(A) <= kept.outside_bytes() < len(A) + MIB  # the other file is the other's too
    with pytest.raises(CachedError, match="not free"):
        kept.keeper.release(two.id)
    waiting = threading.Timer(0.2, close_all, [mapped])
    waiting.start()
    assert kept.keeper.release(two.id) is False and kept.outside_bytes() == 0
    assert kept.gpus.used_bytes(kept.uuid) < len(B) + len(C) + MIB
    assert kept.keeper.release(other.id) and kept.gpus.used_bytes(kept.uuid) == 0


def test_another_uid_gets_only_what_is_proven_again(kept: Kept, two: Manifest, other: Manifest) -> None:
    kept.load(two)
    kept.load(other)
    for uid in (1000, NOBODY, 1000, 1001):  # untouched, so it may change hands
        given, received = kept.keeper.descriptors(two.id, uid)
        assert given == (1000 if uid == NOBODY else uid)
        close_all(received)
    given, received = kept.keeper.descriptors(other.id, NOBODY)
    assert given == 1001  # for what they share
    close_all(received[:-1])
    last = received[-1]
    layout = kept.keeper.descriptors(other.id, NOBODY)[1]
    size = read_layout(layout[0]).blobs[-1].blocks[-1]
    close_all(layout)
    os.pwrite(last, bytes([os.pread(last, 1, size // 2)[0] ^ 1]), size // 2)
    close_all(kept.keeper.descriptors(other.id, 1001)[1])  # who may have done it gets it
    with pytest.raises(CachedError) as caught:
        kept.keeper.descriptors(other.id, 1000)
    assert caught.value.problem.kind is ErrorKind.DATA_LOSS
    assert kept.residents() == set()  # both had shared something of what was to be proven
    os.close(last)


def test_a_fillers_death_costs_what_was_not_sealed(kept: Kept, two: Manifest) -> None:
    progress: list[tuple[int, int]] = []
    kept.gpus.fail("cuMemcpyHtoDAsync", kill=True, after=18, times=1)
    kept.load(two, lambda done, total: progress.append((done, total)))
    assert kept.residents() == {two.id}
    assert {total for _, total in progress} <= {len(A) + len(B), len(B)}
    used = kept.gpus.used_bytes(kept.uuid)
    kept.keeper.release(two.id)

    kept.gpus.fail("cuMemcpyHtoDAsync", kill=True)
    with pytest.raises(CachedError) as caught:
        kept.load(two)
    problem = caught.value.problem
    assert problem.reason == "FILLER_DIED" and problem.temporary and "-9" in problem.message
    assert kept.gpus.used_bytes(kept.uuid) == 0
    with pytest.raises(CachedError, match="again and again"):
        kept.load(two)
    kept.gpus.heal("cuMemcpyHtoDAsync")
    time.sleep(0.6)
    kept.load(two)
    assert kept.gpus.used_bytes(kept.uuid) == used


def test_a_cancelled_or_refused_load_leaves_nothing(
    kept: Kept, two: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.gpus.fail("cuMemcpyHtoDAsync", sleep_s=0.2)
    cancel = threading.Event()
    threading.Timer(0.5, cancel.set).start()
    with pytest.raises(LoadCancelled):
        kept.keeper.load(two.id, quiet, cancel)
    assert kept.gpus.used_bytes(kept.uuid) == 0
    kept.gpus.heal("cuMemcpyHtoDAsync")
    with kept.gpus.others(kept.uuid, 50 * MIB), pytest.raises(CachedError) as caught:
        kept.load(two)
    assert caught.value.problem.kind is ErrorKind.NO_ROOM and kept.residents() == set()
    threading.Timer(0.3, setattr, [kept, "unfit_reason", "XID 79"]).start()
    kept.gpus.fail("cuMemcpyHtoDAsync", sleep_s=0.2)
    with pytest.raises(CachedError, match="XID 79"):
        kept.load(two)
    kept.unfit_reason = ""
    eventually(lambda: not kept.keeper.inventory().gpu.unfit_reason)
    monkeypatch.setattr("preloader.filling.STUCK_S", 0.5)
    kept.gpus.fail("cuMemcpyHtoDAsync", sleep_s=10)  # the filler goes on to say how far it is
    with pytest.raises(CachedError) as caught:
        kept.load(two)
    assert caught.value.problem.reason == "FILLER_STUCK" and caught.value.problem.temporary
    assert kept.gpus.used_bytes(kept.uuid) == 0


def test_what_cannot_be_proven_now_is_adopted_and_proven_later(
    kept: Kept, gpus: gpukit.Gpus, two: Manifest
) -> None:
    kept.load(two)
    _, received = kept.keeper.descriptors(two.id, 1000)
    with contextlib.ExitStack() as stack:
        successor = Kept(gpus, kept.uuid, stack)
        gpus.fail("cuDevicePrimaryCtxRetain", "CUDA_ERROR_OUT_OF_MEMORY")
        successor.keeper.adopt(two.id, 1000, [os.dup(fd) for fd in received])
        assert successor.residents() == {two.id}
        given, again = successor.keeper.descriptors(two.id, NOBODY)
        assert given == ANYBODY
        close_all(again)
        with pytest.raises(CachedError):
            successor.keeper.descriptors(two.id, 1000)
        gpus.heal("cuDevicePrimaryCtxRetain")
        given, again = successor.keeper.descriptors(two.id, 1000)
        assert given == 1000
        close_all(again)
    close_all(received)
