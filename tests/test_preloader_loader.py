"""The loader over real host memory: nothing unproven is told, nothing wrong stays, sharing is counted."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from residentkit import (
    MIB,
    blob_path,
    charged_elsewhere,
    content,
    locked_bytes,
    manifest_path,
    may_lock,
    may_mount_read_only,
    put_artifact,
    rounded,
)

from cached.model import CHUNK_BYTES, ArtifactId, CachedError, ErrorKind, Manifest, Resident
from preloader.groups import Groups, own_groups
from preloader.loader import Loader
from preloader.memory.host import HostMemory
from preloader.standing import NOBODY, LoadCancelled

BIG = content(CHUNK_BYTES + MIB + 1, seed=1)
SMALL = content(70_000, seed=2)
OTHER = content(90_000, seed=3)


def quiet(done: int, total: int) -> None:
    pass


def handed(loader: Loader, artifact: ArtifactId) -> tuple[int, ...]:
    return loader.descriptors(artifact, NOBODY)[1]


def load(loader: Loader, manifest: Manifest) -> Resident:
    return loader.load(manifest.id, quiet, threading.Event())


def refused(loader: Loader, manifest: Manifest) -> CachedError:
    """The error of a load that must leave nothing behind."""
    before = (locked_bytes(), open_files(), loader.residents())
    with pytest.raises(CachedError) as caught:
        load(loader, manifest)
    assert (locked_bytes(), open_files(), loader.residents()) == before
    return caught.value


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def close_all(fds: tuple[int, ...]) -> None:
    for fd in fds:
        os.close(fd)


def locking(data_dir: Path) -> Loader:
    return Loader(data_dir, HostMemory(own_groups(), None))


def unlocked(data_dir: Path) -> Loader:
    return Loader(data_dir, HostMemory(own_groups(), 0, "not allowed here"))


each_kind = pytest.mark.parametrize("kind", [locking, unlocked])


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return put_artifact(tmp_path, {"model.safetensors": BIG, "config.json": SMALL, "copy.json": SMALL})


@each_kind
def test_a_load_makes_it_resident_and_repeating_it_is_harmless(
    kind: Callable[[Path], Loader], tmp_path: Path, manifest: Manifest
) -> None:
    loader, seen = kind(tmp_path), []
    size_bytes = len(BIG) + len(SMALL)
    expected = Resident(manifest.id, size_bytes, kind is locking and may_lock(size_bytes))
    found = loader.load(manifest.id, lambda done, total: seen.append((done, total)), threading.Event())
    assert found == expected and loader.residents() == (expected,)
    assert seen[-1] == (expected.size_bytes, expected.size_bytes)
    before = locked_bytes()
    assert load(loader, manifest) == expected
    assert locked_bytes() == before
    assert loader.release(manifest.id) and not loader.release(manifest.id)
    assert loader.residents() == ()


@each_kind
def test_descriptors_come_in_the_manifests_order(
    kind: Callable[[Path], Loader], tmp_path: Path, manifest: Manifest
) -> None:
    loader = kind(tmp_path)
    load(loader, manifest)
    fds = handed(loader, manifest.id)
    assert [os.fstat(fd).st_size for fd in fds] == [b.size_bytes for b in manifest.distinct_blobs()]
    loader.release(manifest.id)
    assert os.pread(fds[0], len(SMALL), 0) == SMALL  # config.json is first; the copies outlive the residency
    close_all(fds)
    with pytest.raises(CachedError, match="not resident"):
        handed(loader, manifest.id)


def test_a_shared_blob_is_locked_once_and_until_its_last_user_goes(tmp_path: Path) -> None:
    before = locked_bytes()
    shared, first, second = b"s" * 17_000, b"1" * 9_000, b"2" * 5_000
    one = put_artifact(tmp_path, {"shared": shared, "a": first})
    two = put_artifact(tmp_path, {"shared": shared, "b": second})
    loader = locking(tmp_path)
    assert load(loader, one).locked and load(loader, two).locked
    assert locked_bytes() - before == sum(rounded(len(data)) for data in (shared, first, second))
    loader.release(one.id)
    assert locked_bytes() - before == rounded(len(shared)) + rounded(len(second))
    loader.release(two.id)
    assert locked_bytes() == before


@each_kind
@pytest.mark.parametrize("chunk", [0, 1])
def test_a_wrong_chunk_is_named_and_nothing_stays(
    kind: Callable[[Path], Loader], tmp_path: Path, manifest: Manifest, chunk: int
) -> None:
    blob = manifest.files[2].blob
    flip(blob_path(tmp_path, blob.sha256), chunk * CHUNK_BYTES + 5)
    problem = refused(kind(tmp_path), manifest).problem
    assert (problem.kind, problem.reason) == (ErrorKind.DATA_LOSS, "CHUNK_MISMATCH")
    for words in ("model.safetensors", blob.sha256, f"chunk {chunk} ", blob.chunks[chunk]):
        assert words in problem.message


@each_kind
def test_a_wrong_chunk_takes_no_sharer_along(kind: Callable[[Path], Loader], tmp_path: Path) -> None:
    loader = kind(tmp_path)
    good = put_artifact(tmp_path, {"a": SMALL})
    bad = put_artifact(tmp_path, {"a": SMALL, "b": OTHER})
    load(loader, good)
    flip(blob_path(tmp_path, bad.files[1].blob.sha256), 0)
    assert refused(loader, bad).problem.reason == "CHUNK_MISMATCH"
    close_all(handed(loader, good.id))
    loader.release(good.id)


def flip(path: Path, offset: int) -> None:
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0xFF]))


# --- what the store may lack ------------------------------------------------------------------


def test_there_is_no_store_yet(tmp_path: Path, manifest: Manifest) -> None:
    problem = refused(unlocked(tmp_path / "later"), manifest).problem
    assert (problem.kind, problem.reason) == (ErrorKind.UNAVAILABLE, "NO_DATA_DIR") and problem.temporary


def test_the_artifact_is_not_there(tmp_path: Path, manifest: Manifest) -> None:
    manifest_path(tmp_path, manifest.id).unlink()
    problem = refused(unlocked(tmp_path), manifest).problem
    assert (problem.kind, problem.reason) == (ErrorKind.NOT_FOUND, "NO_ARTIFACT")


def test_a_blob_is_missing(tmp_path: Path, manifest: Manifest) -> None:
    blob_path(tmp_path, manifest.files[2].blob.sha256).unlink()
    problem = refused(unlocked(tmp_path), manifest).problem
    assert (problem.kind, problem.reason) == (ErrorKind.DATA_LOSS, "BLOB_MISSING")
    assert "model.safetensors" in problem.message


def test_a_blob_has_the_wrong_size(tmp_path: Path, manifest: Manifest) -> None:
    path = blob_path(tmp_path, manifest.files[2].blob.sha256)
    path.chmod(0o644)
    os.truncate(path, 77)
    problem = refused(unlocked(tmp_path), manifest).problem
    assert (problem.kind, problem.reason) == (ErrorKind.DATA_LOSS, "BLOB_SIZE")
    assert "has 77 bytes" in problem.message and str(len(BIG)) in problem.message


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text[:-20],
        lambda text: b"[]",
        lambda text: b'{"files": 7}',
        lambda text: text.replace(b"copy.json", b"kopy.json"),
        lambda text: text.replace(b'"chunks":["', b'"chunks":["00","'),
    ],
    ids=["torn", "list", "number", "another-artifact", "too-many-chunks"],
)
def test_a_manifest_that_is_not_this_artifacts(
    tmp_path: Path, manifest: Manifest, edit: Callable[[bytes], bytes]
) -> None:
    path = manifest_path(tmp_path, manifest.id)
    path.write_bytes(edit(path.read_bytes()))
    assert refused(unlocked(tmp_path), manifest).problem.reason == "BAD_MANIFEST"


def test_a_blob_that_is_a_link_elsewhere_is_not_followed(tmp_path: Path, manifest: Manifest) -> None:
    path = blob_path(tmp_path, manifest.files[2].blob.sha256)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert refused(unlocked(tmp_path), manifest).problem.reason == "STORE_DENIED"


# --- unlocked residents -------------------------------------------------------------------------


def test_an_unlocked_resident_is_proven_again_for_each_handoff(tmp_path: Path, manifest: Manifest) -> None:
    loader = unlocked(tmp_path)
    load(loader, manifest)
    close_all(handed(loader, manifest.id))
    flip(blob_path(tmp_path, manifest.files[2].blob.sha256), CHUNK_BYTES + 1)
    before = open_files()
    with pytest.raises(CachedError, match=r"model\.safetensors") as caught:
        handed(loader, manifest.id)
    assert caught.value.problem.kind is ErrorKind.DATA_LOSS
    assert loader.residents() == () and open_files() == before - 2


# --- cancelling, room, charge, watching -----------------------------------------------------------


@each_kind
def test_a_cancelled_load_leaves_nothing(
    kind: Callable[[Path], Loader], tmp_path: Path, manifest: Manifest
) -> None:
    loader, cancel, before = kind(tmp_path), threading.Event(), (locked_bytes(), open_files())
    with pytest.raises(LoadCancelled):  # even when all was proven by then
        loader.load(manifest.id, lambda done, total: cancel.set(), cancel)
    assert loader.residents() == () and (locked_bytes(), open_files()) == before
    load(loader, manifest)
    loader.release(manifest.id)


def test_what_does_not_fit_is_refused_before_anything_is_read(tmp_path: Path, manifest: Manifest) -> None:
    group = tmp_path / "group"
    group.mkdir()
    for name, text in (("memory.max", "1000000"), ("memory.current", "0"), ("memory.stat", "")):
        (group / name).write_text(text)
    loader = Loader(tmp_path, HostMemory(Groups((group,), 2), None))
    problem = refused(loader, manifest).problem
    assert (problem.kind, problem.reason) == (ErrorKind.NO_ROOM, "EXCEEDS_MEMORY")


def test_pages_that_stay_charged_elsewhere_are_refused_after_a_second_try(tmp_path: Path) -> None:
    manifest = put_artifact(tmp_path, {"a": bytes(9_000)})
    loader = Loader(tmp_path, charged_elsewhere(tmp_path / "group"))
    assert refused(loader, manifest).problem.reason == "CHARGED_ELSEWHERE"


def test_changes_are_heard(tmp_path: Path, manifest: Manifest) -> None:
    loader = unlocked(tmp_path)
    start = loader.wait_for_change(-1, 0)
    assert loader.wait_for_change(start, 0.01) == start
    changes: list[int] = []
    waiter = threading.Thread(target=lambda: changes.append(loader.wait_for_change(start, 10)))
    waiter.start()
    load(loader, manifest)
    waiter.join(5)
    assert changes and changes[0] != start
    loader.release(manifest.id)
    assert loader.wait_for_change(changes[0], 0) != changes[0]


# --- write protection -------------------------------------------------------------------------


def test_no_receiver_can_reopen_a_descriptor_for_writing_where_that_is_said(
    tmp_path: Path, manifest: Manifest
) -> None:
    loader = unlocked(tmp_path)
    load(loader, manifest)
    assert loader.write_protected() is may_mount_read_only()
    path = blob_path(tmp_path, manifest.distinct_blobs()[0].sha256)
    path.chmod(0o666)
    os.close(os.open(path, os.O_RDWR))  # the store's own mount lets it
    (fd, *others) = handed(loader, manifest.id)
    os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY))
    if loader.write_protected():
        _check_nothing_can_be_written(fd)
    else:  # it was right to say so
        os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDWR))
    close_all((fd, *others))


def _check_nothing_can_be_written(fd: int) -> None:
    for flags in (os.O_RDWR, os.O_WRONLY, os.O_RDWR | os.O_TRUNC):
        with pytest.raises(OSError, match="Read-only file system"):
            os.open(f"/proc/self/fd/{fd}", flags)
    with pytest.raises(OSError, match="Read-only file system"):
        os.fchmod(fd, 0o666)
