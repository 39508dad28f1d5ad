"""The preloader's real processes: parent and standby, killed, restarted, limited and deprived of rights."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from residentkit import (
    MIB,
    content,
    disk_read_bytes,
    drop_cache,
    locked_bytes,
    may_mount_read_only,
    put_artifact,
    rounded,
)

from cached.model import HOST, CachedError, ErrorKind, Inventory, Manifest, Resident
from cached.standby import Standby
from preloader.groups import charged_elsewhere_bytes, own_groups
from preloader.memory.host import lock_allowance

ALLOWANCE, WHY_NOT = lock_allowance()
can_lock = pytest.mark.skipif(
    ALLOWANCE is not None, reason=WHY_NOT or "the limit on locked memory is too low"
)
protects = pytest.mark.skipif(
    not may_mount_read_only(), reason="no right to make a read-only mount (CAP_SYS_ADMIN, Linux 5.12)"
)
BIG_BYTES = 40 * MIB
GROUP_BYTES = 128 * MIB
PATIENCE_S = 20.0


class Preloader:
    """A running ``preloader serve`` and what can be asked of it."""

    def __init__(self, process: subprocess.Popen[str], run_dir: Path) -> None:
        self.process = process
        self.socket = run_dir / "standby/host.sock"

    def child(self) -> int:
        """The standby's pid, once there is one that serves."""
        return self.ask(_inventory).pid

    def ask(self, question: Callable[[Standby], object]):
        """Ask the standby, waiting for it to answer at all."""
        return asyncio.run(_asked(self.socket, question))

    def load(self, manifest: Manifest) -> Resident:
        return self.ask(lambda standby: standby.load(manifest.id, lambda done, total: None))

    def release(self, manifest: Manifest) -> None:
        self.ask(lambda standby: standby.release(manifest.id))

    def inventory(self) -> Inventory:
        return self.ask(_inventory)


async def _asked(path: Path, question):
    deadline = time.monotonic() + PATIENCE_S
    while True:
        standby = Standby(HOST, path)
        try:
            return await question(standby)
        except CachedError as error:
            if error.problem.reason != "STANDBY_GONE" or time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.05)
        finally:
            await standby.close()


async def _inventory(standby: Standby) -> Inventory:
    watch = standby.watch()
    try:
        return await anext(watch)
    finally:
        await watch.aclose()


@contextmanager
def preloader(folder: Path, *more: str, prefix: tuple[str, ...] = ()) -> Iterator[Preloader]:
    folders = ["--run-dir", str(folder / "run"), "--data-dir", str(folder / "data")]
    command = [*prefix, sys.executable, "-m", "preloader", "serve", *folders, *more]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield Preloader(process, folder / "run")
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE_S)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def eventually(happens: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happens():
        assert time.monotonic() < deadline, f"it did not happen within {PATIENCE_S} s"
        time.sleep(0.02)


@pytest.fixture
def big(tmp_path: Path) -> Manifest:
    return put_artifact(
        tmp_path / "data", {"model.bin": content(BIG_BYTES, seed=6), "a": content(100, seed=7)}
    )


# --- lives and deaths ---------------------------------------------------------------------------


def test_it_starts_before_there_is_a_store(tmp_path: Path) -> None:
    with preloader(tmp_path) as running:
        assert running.inventory().residents == ()
        manifest = put_artifact(tmp_path / "elsewhere", {"a": content(1000)})
        with pytest.raises(CachedError) as caught:
            running.load(manifest)
        problem = caught.value.problem
        assert (problem.kind, problem.reason) == (ErrorKind.UNAVAILABLE, "NO_DATA_DIR") and problem.temporary
        (tmp_path / "elsewhere").rename(tmp_path / "data")
        assert running.load(manifest).size_bytes == 1000


def test_sigterm_ends_both_and_leaves_no_socket(tmp_path: Path) -> None:
    with preloader(tmp_path) as running:
        child = running.child()
        assert [oct(p.stat().st_mode & 0o777) for p in (tmp_path / "run/standby").glob("*.sock")] == [
            "0o600"
        ] * 2
        running.process.terminate()
        assert running.process.wait(PATIENCE_S) == 0
        assert not runs(child) and not list((tmp_path / "run/standby").glob("*.sock"))


def test_a_killed_parent_takes_its_child_along_and_a_new_one_takes_over(
    tmp_path: Path, big: Manifest
) -> None:
    with preloader(tmp_path) as first:
        first.load(big)
        child = first.child()
        first.process.kill()
        first.process.wait(PATIENCE_S)
        eventually(lambda: not runs(child))
    with preloader(tmp_path) as second:
        assert second.child() != child
        assert second.load(big).size_bytes == BIG_BYTES + 100


def test_a_second_parent_is_refused_with_the_firsts_pid(tmp_path: Path) -> None:
    with preloader(tmp_path) as running:
        running.child()
        with preloader(tmp_path) as second:
            _, told = second.process.communicate(timeout=PATIENCE_S)
            assert second.process.returncode == 1
            assert f"pid {running.process.pid}" in told and "hint:" in told
        assert runs(running.child())


@pytest.mark.parametrize(
    "arguments", [("--devices", "cuda:all"), ("--devices", "host,cuda:0"), ("--devices", "")]
)
def test_devices_of_later_versions_are_refused(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    with preloader(tmp_path, *arguments) as running:
        _, told = running.process.communicate(timeout=PATIENCE_S)
        assert running.process.returncode == 2 and "use host" in told


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with preloader(tmp_path / ("x" * 100)) as running:
        _, told = running.process.communicate(timeout=PATIENCE_S)
        assert running.process.returncode == 1 and "too long" in told


def test_a_standby_waits_for_its_predecessors_end(tmp_path: Path) -> None:
    """Two of one device would lock the same pages twice and mistake each other's charges."""
    import fcntl

    (tmp_path / "run/standby").mkdir(parents=True)
    with (tmp_path / "run/standby/host.lock").open("w") as file, preloader(tmp_path) as running:
        fcntl.flock(file, fcntl.LOCK_EX)
        time.sleep(1.0)
        assert not running.socket.exists()
        fcntl.flock(file, fcntl.LOCK_UN)
        running.child()


def test_health_answers(tmp_path: Path) -> None:
    with preloader(tmp_path) as running:
        running.child()
        with grpc.insecure_channel(f"unix:{running.socket}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for name in ("", "preloader.v1.Standby"):
                answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING


# --- memory -----------------------------------------------------------------------------------


@can_lock
def test_release_unlocks(tmp_path: Path, big: Manifest) -> None:
    with preloader(tmp_path) as running:
        child = running.child()
        resident = running.load(big)
        assert resident.locked and running.inventory().residents == (resident,)
        assert locked_bytes(child) == rounded(BIG_BYTES) + rounded(100)
        running.release(big)
        assert locked_bytes(child) == 0 and running.inventory().residents == ()


@contextmanager
def limited_group(limit_bytes: int) -> Iterator[Path]:
    """A control group below our own, with a limit; skips where there can be none."""
    own = own_groups()
    if not own.directories:
        pytest.skip("no memory controller")
    directory = own.directories[0] / f"preloader-test-{os.getpid()}"
    try:
        directory.mkdir()
    except OSError as error:
        pytest.skip(f"no right to make control groups: {error}")
    try:
        name = "memory.max" if own.version == 2 else "memory.limit_in_bytes"
        if not (directory / name).exists():
            pytest.skip("the memory controller is not handed down")
        (directory / name).write_text(str(limit_bytes))
        yield directory
    finally:
        eventually(lambda: not (directory / "cgroup.procs").read_text())
        directory.rmdir()


def inside(group: Path) -> tuple[str, ...]:
    """The beginning of a command that runs in ``group``."""
    return ("sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh")


def unevictable(group: Path) -> int:
    lines = (group / "memory.stat").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("unevictable "))


def charged_to(group: Path, locked: int) -> bool:
    """Whether ``group`` is charged for what is locked, as far as the kernel's figures can tell."""
    return charged_elsewhere_bytes(locked, unevictable(group), os.cpu_count() or 1) == 0


@contextmanager
def nowhere_in_particular() -> Iterator[None]:
    yield None


@can_lock
@pytest.mark.parametrize("limited", [False, True], ids=["unlimited", "limited-group"])
def test_a_killed_standby_comes_back_and_locks_again_without_the_disk(
    tmp_path: Path, big: Manifest, limited: bool
) -> None:
    with (
        limited_group(GROUP_BYTES) if limited else nowhere_in_particular() as group,
        preloader(tmp_path, prefix=inside(group) if group else ()) as running,
    ):
        first = running.child()
        drop_cache(tmp_path / "data", big)
        running.load(big)
        if disk_read_bytes(first) < BIG_BYTES:
            pytest.skip("this file system's pages cannot be dropped")
        os.kill(first, signal.SIGKILL)
        eventually(lambda: not runs(first))
        second = running.child()
        assert second != first and running.inventory().residents == ()
        started = disk_read_bytes(second)  # its own program, perhaps
        assert running.load(big).locked
        # Between the two nothing is locked, so a machine short of memory may have evicted a little.
        assert disk_read_bytes(second) - started < BIG_BYTES // 4
        assert locked_bytes(second) == rounded(BIG_BYTES) + rounded(100)


@can_lock
def test_a_limited_group_is_charged_for_what_it_locks(tmp_path: Path, big: Manifest) -> None:
    other = put_artifact(tmp_path / "data", {"zeros": bytes(60 * MIB)})
    with limited_group(GROUP_BYTES) as group, preloader(tmp_path, prefix=inside(group)) as running:
        assert running.inventory().limit_bytes == GROUP_BYTES
        running.load(big)  # its pages were ours, the writer's
        assert charged_to(group, BIG_BYTES)
        with pytest.raises(CachedError, match="do not fit") as caught:
            running.load(other)
        assert caught.value.problem.kind is ErrorKind.NO_ROOM
        assert f"{GROUP_BYTES / MIB:.1f} MiB of control group {group}" in caught.value.problem.message
        running.release(big)
        running.load(other)
        assert BIG_BYTES < unevictable(group) < 100 * MIB


@can_lock
@pytest.mark.parametrize("limit_bytes", [GROUP_BYTES, 2**50], ids=["limited", "unlimited"])
def test_pages_that_a_foreign_group_maps_are_not_locked(
    tmp_path: Path, big: Manifest, limit_bytes: int
) -> None:
    import mmap

    if (os.cpu_count() or 1) > 32:
        pytest.skip("the kernel's figures are too coarse for this size on that many processors")
    digest = big.files[1].blob.sha256
    path = tmp_path / "data/blobs/sha256" / digest[:2] / digest
    with limited_group(limit_bytes) as group, preloader(tmp_path, prefix=inside(group)) as running:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert sum(mapped[i] for i in range(0, BIG_BYTES, 4096)) > 0  # touched, so it cannot be dropped
            with pytest.raises(CachedError, match="another control group") as caught:
                running.load(big)
            assert caught.value.problem.reason == "CHARGED_ELSEWHERE" and caught.value.problem.temporary
            assert locked_bytes(running.child()) == 0 and running.inventory().residents == ()
        assert running.load(big).locked
        assert charged_to(group, BIG_BYTES)


# --- rights -----------------------------------------------------------------------------------


@protects
def test_a_root_process_cannot_reopen_a_received_descriptor_for_writing(
    tmp_path: Path, big: Manifest
) -> None:
    async def try_to_write(standby: Standby) -> list[str]:
        await standby.load(big.id, lambda done, total: None)
        told = []
        for fd in await standby.descriptors(big.id):
            os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY))
            try:
                os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
            except OSError as error:
                told.append(error.strerror)
        return told

    with preloader(tmp_path) as running:
        assert running.inventory().write_protected
        assert running.ask(try_to_write) == ["Read-only file system"] * 2


def without_rights(run_dir: Path) -> tuple[str, ...]:
    """The beginning of a command that runs as another user where that is possible, and may lock nothing."""
    nothing = ("prlimit", "--memlock=0:0")
    if os.geteuid() != 0:
        return nothing
    run_dir.mkdir()
    os.chown(run_dir, 65534, 65534)
    # This right stays, since the interpreter may be where only root can look.
    only = "-all,+dac_read_search"
    caps = (f"--bounding-set={only}", f"--inh-caps={only}", f"--ambient-caps={only}")
    return ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *caps, *nothing)


def test_without_the_right_to_lock_it_works_unlocked_and_says_so(tmp_path: Path, big: Manifest) -> None:
    async def first_bytes(standby: Standby) -> list[bytes]:
        return [os.pread(fd, 8, 0) for fd in await standby.descriptors(big.id)]

    with preloader(tmp_path, prefix=without_rights(tmp_path / "run")) as running:
        inventory = running.inventory()
        assert not inventory.can_lock and "RLIMIT_MEMLOCK is 0" in inventory.cannot_lock_reason
        if os.geteuid() == 0:
            assert os.stat(f"/proc/{inventory.pid}").st_uid == 65534 and not inventory.write_protected
        assert running.load(big) == Resident(big.id, BIG_BYTES + 100, locked=False)
        assert locked_bytes(inventory.pid) == 0
        assert running.ask(first_bytes) == [content(100, seed=7)[:8], content(BIG_BYTES, seed=6)[:8]]
