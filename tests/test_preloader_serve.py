"""The preloader's real processes: parent and standby, killed, restarted, limited and deprived of rights."""

from __future__ import annotations

import asyncio
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from residentkit import (
    MIB,
    SLACK,
    blob_path,
    content,
    disk_read_bytes,
    drop_cache,
    drops_pages,
    locked_bytes,
    may_mount_read_only,
    mounts_can_be_copied,
    put_artifact,
    put_manifest,
    rounded,
)

from cached.model import (
    CHUNK_BYTES,
    HOST,
    Blob,
    CachedError,
    Digest,
    ErrorKind,
    Inventory,
    Manifest,
    ManifestFile,
    Resident,
)
from cached.standby import Standby
from preloader.groups import Groups, charged_elsewhere_bytes, own_groups
from preloader.memory.host import lock_allowance

BIG_BYTES = max(40 * MIB, 2 * SLACK)  # far more than the kernel's figures may be off
MACHINE_BYTES = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
GROUP_BYTES = 2 * BIG_BYTES + 48 * MIB
ALLOWANCE_BYTES, _ = lock_allowance()
# Whether a standby that this process starts may lock the big model. What follows from a lack of that right is
# tested in any case; the lock itself, with what everybody may lock, by the tests of memory and loader.
LOCKS = ALLOWANCE_BYTES is None or ALLOWANCE_BYTES >= BIG_BYTES + 100
LOCKED_BYTES = rounded(BIG_BYTES) + rounded(100) if LOCKS else 0
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


@pytest.mark.parametrize("devices", ["gpu0", "host,cuda:GPU/0", ""])
def test_what_is_no_device_is_refused(tmp_path: Path, devices: str) -> None:
    with preloader(tmp_path, "--devices", devices) as running:
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


def test_release_unlocks(tmp_path: Path, big: Manifest) -> None:
    with preloader(tmp_path) as running:
        child = running.child()
        resident = running.load(big)
        inventory = running.inventory()
        assert resident == Resident(big.id, BIG_BYTES + 100, LOCKS) and inventory.residents == (resident,)
        assert inventory.can_lock is LOCKS is not bool(inventory.cannot_lock_reason)
        assert locked_bytes(child) == LOCKED_BYTES
        running.release(big)
        assert locked_bytes(child) == 0 and running.inventory().residents == ()


@contextmanager
def limited_group(limit_bytes: int) -> Iterator[Path | None]:
    """A control group below our own, with a limit. None where this process may not make one."""
    own = own_groups()
    if not own.directories:
        yield None
        return
    directory = own.directories[0] / f"preloader-test-{os.getpid()}"
    limit = "memory.max" if own.version == 2 else "memory.limit_in_bytes"
    try:
        yield directory if _made(directory, limit, limit_bytes) else None
    finally:
        if directory.exists():
            eventually(lambda: not (directory / "cgroup.procs").read_text())
            directory.rmdir()


def _made(directory: Path, limit: str, limit_bytes: int) -> bool:
    try:
        directory.mkdir()
        if not (directory / limit).exists():
            return False  # the memory controller is not handed down
        (directory / limit).write_text(str(limit_bytes))
    except OSError:
        return False
    return True


def inside(group: Path | None) -> tuple[str, ...]:
    """The beginning of a command that runs in ``group``, or where we are."""
    return ("sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh") if group else ()


def unevictable(group: Path) -> int:
    return Groups((group,), 2).unevictable_bytes() or 0


def charged_to(group: Path, locked: int) -> bool:
    """Whether ``group`` is charged for what is locked, as far as the kernel's figures can tell."""
    return charged_elsewhere_bytes(locked, unevictable(group), os.cpu_count() or 1) == 0


@pytest.mark.parametrize("limited", [False, True], ids=["unlimited", "limited-group"])
def test_a_killed_standby_comes_back_and_locks_again_without_the_disk(
    tmp_path: Path, big: Manifest, limited: bool
) -> None:
    with (
        limited_group(GROUP_BYTES) if limited else nullcontext() as group,
        preloader(tmp_path, prefix=inside(group)) as running,
    ):
        first = running.child()
        drop_cache(tmp_path / "data", big)
        running.load(big)
        assert disk_read_bytes(first) >= BIG_BYTES or not drops_pages(tmp_path)
        os.kill(first, signal.SIGKILL)
        eventually(lambda: not runs(first))
        second = running.child()
        assert second != first and running.inventory().residents == ()
        started = disk_read_bytes(second)  # its own program, perhaps
        assert running.load(big).locked is LOCKS
        # Between the two nothing is locked, so a machine short of memory may have evicted a little.
        assert disk_read_bytes(second) - started < BIG_BYTES // 4
        assert locked_bytes(second) == LOCKED_BYTES


def test_the_limit_of_the_group_that_it_runs_in_is_kept(tmp_path: Path, big: Manifest) -> None:
    """A group of its own with a low limit, or where it may have none, the group that the tests run in."""
    with limited_group(GROUP_BYTES) as group, preloader(tmp_path, prefix=inside(group)) as running:
        limit_bytes = GROUP_BYTES if group else own_groups().limit_bytes()
        assert running.inventory().limit_bytes == limit_bytes
        running.load(big)
        with pytest.raises(CachedError, match="exceed") as caught:
            running.load(put_promised(tmp_path / "data", MACHINE_BYTES))
        assert caught.value.problem.kind is ErrorKind.NO_ROOM
        assert not group or f"MiB of control group {group}" in caught.value.problem.message
        assert [resident.artifact for resident in running.inventory().residents] == [big.id]
        if group and LOCKS:
            check_charges(tmp_path / "data", running, group, big)


def put_promised(data_dir: Path, size_bytes: int) -> Manifest:
    """An artifact of which only the manifest is there: the want of room shows before anything is read."""
    chunks = -(-size_bytes // CHUNK_BYTES)
    blob = Blob(Digest("0" * 64), size_bytes, ("0" * 32,) * chunks)
    return put_manifest(data_dir, (ManifestFile("promised", blob),))


def check_charges(data_dir: Path, running: Preloader, group: Path, big: Manifest) -> None:
    """A group that has ``big`` locked is charged for it, and for nothing once that is released."""
    other = put_artifact(data_dir, {"zeros": bytes(BIG_BYTES + 20 * MIB)})
    assert charged_to(group, BIG_BYTES)  # its pages were ours, the writer's
    with pytest.raises(CachedError, match="do not fit") as caught:
        running.load(other)
    assert caught.value.problem.kind is ErrorKind.NO_ROOM
    assert f"{GROUP_BYTES / MIB:.1f} MiB of control group {group}" in caught.value.problem.message
    running.release(big)
    running.load(other)
    assert BIG_BYTES < unevictable(group) < BIG_BYTES + 60 * MIB


@pytest.mark.parametrize("limit_bytes", [GROUP_BYTES, 2**50], ids=["limited", "unlimited"])
def test_pages_that_a_foreign_group_maps_are_not_locked(
    tmp_path: Path, big: Manifest, limit_bytes: int
) -> None:
    """Foreign where it may have a group of its own; otherwise they are its own group's, and are locked."""
    path = blob_path(tmp_path / "data", big.files[1].blob.sha256)
    with limited_group(limit_bytes) as group, preloader(tmp_path, prefix=inside(group)) as running:
        running.child()  # what was locked at its start is not counted
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert sum(mapped[i] for i in range(0, BIG_BYTES, 4096)) > 0  # touched, so it cannot be dropped
            if group and LOCKS:
                with pytest.raises(CachedError, match="another control group") as caught:
                    running.load(big)
                assert caught.value.problem.reason == "CHARGED_ELSEWHERE" and caught.value.problem.temporary
                assert locked_bytes(running.child()) == 0 and running.inventory().residents == ()
        assert running.load(big).locked is LOCKS
        assert not (group and LOCKS) or charged_to(group, BIG_BYTES)


# --- rights -----------------------------------------------------------------------------------


def may_mount() -> tuple[str, ...] | None:
    """The beginning of a command that may make the read-only view. None where none may.

    Anybody may in namespaces of their own, unless the machine's owner forbids those.
    """
    if may_mount_read_only():
        return ()
    private = ("unshare", "-Urm")
    made = subprocess.run([*private, "true"], capture_output=True, timeout=PATIENCE_S)
    return private if made.returncode == 0 and mounts_can_be_copied() else None


def test_no_process_can_reopen_a_received_descriptor_for_writing_where_that_is_said(
    tmp_path: Path, big: Manifest
) -> None:
    async def try_to_write(standby: Standby) -> list[str]:
        await standby.load(big.id, lambda done, total: None)
        told = []
        for fd in await standby.descriptors(big.id):
            os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY))
            try:
                os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDWR))
            except OSError as error:
                told.append(error.strerror)
        return told

    for blob in big.distinct_blobs():  # the mode is not what protects it
        blob_path(tmp_path / "data", blob.sha256).chmod(0o666)
    prefix = may_mount()
    with preloader(tmp_path, prefix=prefix or ()) as running:
        assert running.inventory().write_protected is (prefix is not None)
        assert running.ask(try_to_write) == ([] if prefix is None else ["Read-only file system"] * 2)


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
        assert not inventory.write_protected
        if os.geteuid() == 0:
            assert os.stat(f"/proc/{inventory.pid}").st_uid == 65534
        assert running.load(big) == Resident(big.id, BIG_BYTES + 100, locked=False)
        assert locked_bytes(inventory.pid) == 0
        assert running.ask(first_bytes) == [content(100, seed=7)[:8], content(BIG_BYTES, seed=6)[:8]]
