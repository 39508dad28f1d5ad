"""The daemon's client of a standby, against the real service and descriptor socket in this process."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import Mock

import grpc
import pytest
from residentkit import MIB, content, put_artifact

from cached.model import HOST, ArtifactId, CachedError, ErrorKind, Manifest, Problem, Resident
from cached.standby import Standby, device_sockets
from preloader.groups import own_groups
from preloader.loader import Loader
from preloader.memory.host import HostMemory
from preloader.services import DescriptorServer, StandbyService, new_server
from preloader.standing import LoadCancelled

# Together no more than anybody may lock.
SMALL = content(9_000, seed=4)
BIG = content(40_000, seed=5)
NOBODY = ArtifactId("sha256:" + "0" * 64)


@dataclass
class Served:
    """One standby's real service, answering at ``path``."""

    loader: Loader
    server: grpc.Server
    path: Path
    manifest: Manifest

    def stop(self) -> None:
        self.server.stop(None).wait()


def serve(folder: Path, loader: Loader, memory: HostMemory, manifest: Manifest) -> Served:
    DescriptorServer(loader).start(folder / "host.fds.sock")
    server = new_server(StandbyService(loader), folder / "host.sock")
    return Served(loader, server, folder / "host.sock", manifest)


@pytest.fixture(params=["locked", "unlocked"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    allowance, why_not = (None, "") if request.param == "locked" else (0, "not allowed here")
    memory = HostMemory(own_groups(), allowance, why_not)
    manifest = put_artifact(tmp_path, {"a": SMALL, "b": BIG, "c": SMALL})
    made = serve(tmp_path, Loader(tmp_path, memory), memory, manifest)
    yield made
    made.stop()
    for resident in made.loader.residents():
        made.loader.release(resident.artifact)


@pytest.fixture
def locked(served: Served) -> bool:
    return served.loader._memory.cannot_lock_reason == ""


def quiet(done: int, total: int) -> None:
    pass


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


async def eventually(happens: Callable[[], bool]) -> None:
    for _ in range(500):
        if happens():
            return
        await asyncio.sleep(0.02)
    pytest.fail("it did not happen within 10 s")


async def test_from_load_to_release(served: Served, locked: bool) -> None:
    standby, seen = Standby(HOST, served.path), []
    watch = standby.watch()
    first = await anext(watch)
    assert (first.device, first.pid, first.residents) == ("host", os.getpid(), ())
    assert first.can_lock is locked and (first.cannot_lock_reason == "not allowed here") is not locked
    assert first.limit_bytes == own_groups().limit_bytes()

    expected = Resident(served.manifest.id, len(SMALL) + len(BIG), locked)
    assert await standby.load(served.manifest.id, lambda *progress: seen.append(progress)) == expected
    assert seen[-1] == (expected.size_bytes, expected.size_bytes)
    assert (await anext(watch)).residents == (expected,)

    fds = await standby.descriptors(served.manifest.id)
    assert [os.pread(fd, MIB, 0) for fd in fds] == [SMALL, BIG]

    await standby.release(served.manifest.id)
    await standby.release(served.manifest.id)
    assert (await anext(watch)).residents == ()
    with pytest.raises(CachedError, match="is not resident"):
        await standby.descriptors(served.manifest.id)
    await watch.aclose()
    await standby.close()


async def test_kept_descriptors_keep_their_numbers(served: Served, locked: bool) -> None:
    standby = Standby(HOST, served.path, linger_s=0)
    await standby.load(served.manifest.id, quiet)
    first = await standby.descriptors(served.manifest.id)
    before = len(os.listdir("/proc/self/fd"))
    assert await standby.descriptors(served.manifest.id) == first
    many = await asyncio.gather(*(standby.descriptors(served.manifest.id) for _ in range(50)))
    assert set(many) == {first} and len(os.listdir("/proc/self/fd")) <= before + 4  # its connections
    # A locked resident's are not asked for again, so that they are there when nobody answers any more.
    served.path.with_name("host.fds.sock").unlink()
    if locked:
        assert await standby.descriptors(served.manifest.id) == first
    else:
        with pytest.raises(CachedError, match="is gone"):
            await standby.descriptors(served.manifest.id)
    await standby.close()


@pytest.mark.parametrize("served", ["unlocked"], indirect=True)
async def test_an_unlocked_resident_is_proven_again_each_time(served: Served) -> None:
    standby = Standby(HOST, served.path)
    await standby.load(served.manifest.id, quiet)
    assert len(await standby.descriptors(served.manifest.id)) == 2
    digest = served.manifest.distinct_blobs()[1].sha256
    path = served.path.parent / "blobs/sha256" / digest[:2] / digest
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.write(bytes([BIG[0] ^ 1]))
    with pytest.raises(CachedError) as caught:
        await standby.descriptors(served.manifest.id)
    problem = caught.value.problem
    assert (problem.kind, problem.reason) == (ErrorKind.DATA_LOSS, "CHUNK_MISMATCH") and problem.hint
    await standby.close()


async def test_forgotten_descriptors_linger_for_whoever_is_sending_them(served: Served) -> None:
    standby = Standby(HOST, served.path, linger_s=0.2)
    await standby.load(served.manifest.id, quiet)
    fds = await standby.descriptors(served.manifest.id)
    standby.forget(served.manifest.id)
    assert all(map(is_open, fds))
    await eventually(lambda: not any(map(is_open, fds)))
    await standby.close()


async def test_replaced_blobs_come_with_new_descriptors(served: Served) -> None:
    standby = Standby(HOST, served.path)
    await standby.load(served.manifest.id, quiet)
    old = await standby.descriptors(served.manifest.id)
    await standby.release(served.manifest.id)
    for blob in served.manifest.distinct_blobs():
        path = served.path.parent / "blobs/sha256" / blob.sha256[:2] / blob.sha256
        copy = path.with_suffix(".new")
        copy.write_bytes(path.read_bytes())
        copy.rename(path)
    await standby.load(served.manifest.id, quiet)
    standby.forget(served.manifest.id)
    new = await standby.descriptors(served.manifest.id)
    assert set(new).isdisjoint(old) and all(map(is_open, old))
    assert os.fstat(new[0]).st_ino != os.fstat(old[0]).st_ino
    await standby.close()


async def test_it_is_gone_when_its_server_ends(served: Served) -> None:
    standby = Standby(HOST, served.path)
    watch = standby.watch()
    await anext(watch)
    stopping = asyncio.create_task(asyncio.to_thread(served.stop))
    with pytest.raises(CachedError) as caught:
        await anext(watch)
    await stopping
    assert caught.value.problem.reason == "STANDBY_GONE" and caught.value.problem.temporary
    await standby.close()


async def test_nobody_is_there(tmp_path: Path) -> None:
    standby = Standby(HOST, tmp_path / "host.sock")
    for attempt in (anext(standby.watch()), standby.load(NOBODY, quiet), standby.release(NOBODY)):
        with pytest.raises(CachedError) as caught:
            await attempt
        assert (caught.value.problem.kind, caught.value.problem.reason) == (
            ErrorKind.UNAVAILABLE,
            "STANDBY_GONE",
        )
    with pytest.raises(CachedError, match="is gone"):
        await standby.descriptors(NOBODY)
    await standby.close()


async def test_our_own_lack_of_descriptors_is_not_its_end(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    standby = Standby(HOST, served.path)
    with monkeypatch.context() as patched:
        patched.setattr("cached.standby.socket.socket", Mock(side_effect=OSError(errno.EMFILE, "too many")))
        with pytest.raises(CachedError) as caught:
            await standby.descriptors(served.manifest.id)
    assert caught.value.problem.reason == "TOO_MANY_FILES" and caught.value.problem.temporary
    await standby.close()


async def test_closing_ends_what_is_being_asked(tmp_path: Path) -> None:
    silent = await asyncio.start_unix_server(
        lambda reader, writer: asyncio.sleep(60), tmp_path / "host.fds.sock"
    )
    standby = Standby(HOST, tmp_path / "host.sock")
    asking = asyncio.create_task(standby.descriptors(NOBODY))
    await asyncio.sleep(0.1)
    async with asyncio.timeout(5):
        await standby.close()
        with pytest.raises(CachedError, match="is gone"):
            await asking
    silent.close()


async def test_a_bad_id_is_refused(served: Served) -> None:
    standby = Standby(HOST, served.path)
    for attempt in (
        standby.load,
        lambda bad, _: standby.release(bad),
        lambda bad, _: standby.descriptors(bad),
    ):
        with pytest.raises(CachedError, match="is not an artifact id") as caught:
            await attempt("sha256:../../etc/passwd", quiet)
        assert caught.value.problem.kind is ErrorKind.INVALID
    await standby.close()


# --- with a loader that does as it is told ------------------------------------------------------


class ScriptedLoader(Loader):
    """Raises a given problem, or works until it is cancelled."""

    problem: Problem | None = None
    cancelled = False

    def load(self, artifact, on_progress, cancel):
        if self.problem is not None:
            raise CachedError(self.problem)
        on_progress(10, 100)
        self.cancelled = cancel.wait(10)
        raise LoadCancelled

    def descriptors(self, artifact, uid):
        assert self.problem is not None
        raise CachedError(self.problem)


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[Served]:
    memory = HostMemory(own_groups(), 0, "not allowed here")
    manifest = put_artifact(tmp_path, {"a": SMALL})
    made = serve(tmp_path, ScriptedLoader(tmp_path, memory), memory, manifest)
    yield made
    made.stop()


@pytest.mark.parametrize("kind", list(ErrorKind))
@pytest.mark.parametrize("retry_after_s", [None, 2.5])
async def test_problems_cross_whole(scripted: Served, kind: ErrorKind, retry_after_s: float | None) -> None:
    told = Problem(kind, "SOME_REASON", "läuft nicht: 1 of 2", "mend it so", retry_after_s)
    assert isinstance(scripted.loader, ScriptedLoader)
    scripted.loader.problem = told
    standby = Standby(HOST, scripted.path)
    for attempt in (standby.load(NOBODY, quiet), standby.descriptors(NOBODY)):
        with pytest.raises(CachedError) as caught:
            await attempt
        assert caught.value.problem == told
    await standby.close()


async def test_progress_comes_while_it_loads_and_cancelling_ends_the_load(scripted: Served) -> None:
    standby, heard = Standby(HOST, scripted.path), asyncio.Event()

    def on_progress(done: int, total: int) -> None:
        if (done, total) == (10, 100):
            heard.set()

    loading = asyncio.create_task(standby.load(NOBODY, on_progress))
    await asyncio.wait_for(heard.wait(), 5)
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    await eventually(lambda: isinstance(scripted.loader, ScriptedLoader) and scripted.loader.cancelled)
    await standby.close()


# --- finding --------------------------------------------------------------------------------


def test_sockets_are_found_by_device(tmp_path: Path) -> None:
    assert device_sockets(tmp_path) == {}
    folder = tmp_path / "standby"
    folder.mkdir()
    names = ("host.sock", "host.fds.sock", ".host.sock", "host.lock", "preloader.lock", "cuda-GPU-1a-2b.sock")
    for name in names:
        (folder / name).touch()
    assert device_sockets(tmp_path) == {
        "host": folder / "host.sock",
        "cuda:GPU-1a-2b": folder / "cuda-GPU-1a-2b.sock",
    }
