"""One suite for every Fs, then what only real files have: partial blobs, locks, the kernel's errors."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cached.durable import (
    Fs,
    FsyncFailed,
    Partial,
    RealFs,
    complete_lines,
    lock_file,
    remove_tree,
    replace_file,
    temporary_name,
    world_error,
)
from cached.model import CachedError, ErrorKind
from tests.memfs import Chance, Fate, Kill, MemFs, NamesOnly


@pytest.fixture(params=["real", "mem"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Fs, Path]:
    if request.param == "real":
        return RealFs(), tmp_path
    fs = MemFs()
    fs.make_dir(Path("/data"))
    return fs, Path("/data")


# --- the suite that every Fs passes ---------------------------------------------------------


def test_a_file_is_written_read_and_replaced(place: tuple[Fs, Path]) -> None:
    fs, root = place
    fs.write_file(root / "a", b"one")
    fs.write_file(root / "a", b"second")
    assert fs.read_file(root / "a") == b"second"
    assert fs.size_bytes(root / "a") == 6
    assert b"".join(bytes(piece) for piece in fs.read_pieces(root / "a", 4)) == b"second"


def test_what_is_absent_has_no_size_and_cannot_be_read(place: tuple[Fs, Path]) -> None:
    fs, root = place
    assert fs.size_bytes(root / "none") is None
    assert fs.size_bytes(root / "none" / "deeper") is None
    assert fs.size_bytes(root) is None
    assert not fs.is_dir(root / "none")
    assert not fs.is_locked(root / "none")
    for look in (fs.read_file, fs.list_dir, fs.files_under, fs.modified_at, fs.sync_file, fs.sync_dir):
        with pytest.raises(CachedError) as caught:
            look(root / "none")
        assert caught.value.problem.reason == "STORE_IO"
        assert str(root / "none") in str(caught.value)


def test_directories_are_made_with_their_parents_once(place: tuple[Fs, Path]) -> None:
    fs, root = place
    fs.make_dir(root / "a" / "b")
    fs.write_file(root / "a" / "b" / "f", b"x")
    fs.make_dir(root / "a" / "b")
    assert fs.list_dir(root / "a") == ["b"]
    assert fs.is_dir(root / "a" / "b") and not fs.is_dir(root / "a" / "b" / "f")


def test_a_file_needs_its_directory(place: tuple[Fs, Path]) -> None:
    fs, root = place
    with pytest.raises(CachedError):
        fs.write_file(root / "none" / "f", b"x")


def test_rename_replaces_and_keeps_content(place: tuple[Fs, Path]) -> None:
    fs, root = place
    fs.write_file(root / "a", b"new")
    fs.write_file(root / "b", b"old")
    fs.rename(root / "a", root / "b")
    assert fs.list_dir(root) == ["b"] and fs.read_file(root / "b") == b"new"
    with pytest.raises(CachedError):
        fs.rename(root / "a", root / "b")


def test_rename_moves_a_read_only_directory(place: tuple[Fs, Path]) -> None:
    fs, root = place
    fs.make_dir(root / "new")
    fs.write_file(root / "new" / "f", b"x")
    fs.chmod(root / "new", 0o555)
    fs.rename(root / "new", root / "done")
    assert fs.files_under(root) == {"done/f": 1}
    fs.make_dir(root / "other")
    with pytest.raises(CachedError):
        fs.rename(root / "other", root / "done")


def test_renaming_one_name_of_a_file_over_another_does_nothing(place: tuple[Fs, Path]) -> None:
    fs, root = place
    fs.write_file(root / "a", b"x")
    fs.link(root / "a", root / "b")
    fs.rename(root / "a", root / "b")
    assert fs.list_dir(root) == ["a", "b"]


def test_a_link_is_the_same_file(place: tuple[Fs, Path]) -> None:
    fs, root = place
    fs.write_file(root / "a", b"x")
    fs.link(root / "a", root / "b")
    fs.write_file(root / "a", b"changed")
    fs.unlink(root / "a")
    assert fs.read_file(root / "b") == b"changed"
    fs.write_file(root / "c", b"")
    with pytest.raises(CachedError):
        fs.link(root / "b", root / "c")


def test_unlink_and_rmdir_refuse_what_is_not_theirs(place: tuple[Fs, Path]) -> None:
    fs, root = place
    fs.make_dir(root / "d")
    fs.write_file(root / "d" / "f", b"")
    fs.unlink(root / "none", missing_ok=True)
    for change in (lambda: fs.unlink(root / "none"), lambda: fs.rmdir(root / "d")):
        with pytest.raises(CachedError):
            change()
    fs.unlink(root / "d" / "f")
    fs.rmdir(root / "d")
    assert fs.list_dir(root) == []


def test_touch_sets_the_time(place: tuple[Fs, Path]) -> None:
    fs, root = place
    fs.write_file(root / "a", b"")
    fs.touch(root / "a", 1234.5)
    assert fs.modified_at(root / "a") == 1234.5


def test_a_lock_is_taken_once(place: tuple[Fs, Path]) -> None:
    fs, root = place
    handle = fs.lock(root / "lock")
    assert fs.is_locked(root / "lock")
    with pytest.raises(CachedError) as caught:
        fs.lock(root / "lock")
    assert caught.value.problem.reason == "STORE_LOCKED"
    assert str(os.getpid()) in str(caught.value)
    fs.unlock(handle)
    assert not fs.is_locked(root / "lock")
    fs.unlock(fs.lock(root / "lock"))


def test_replace_file_leaves_no_scratch(place: tuple[Fs, Path]) -> None:
    fs, root = place
    for content in (b"one", b"two"):
        replace_file(fs, root / "a", content)
        assert fs.read_file(root / "a") == content
    assert fs.list_dir(root) == ["a"]


def test_remove_tree_takes_read_only_directories_and_nothing_at_all(place: tuple[Fs, Path]) -> None:
    fs, root = place
    fs.make_dir(root / "t" / "deep" / "er")
    fs.write_file(root / "t" / "deep" / "f", b"x")
    for directory in ("t/deep/er", "t/deep", "t"):
        fs.chmod(root / directory, 0o555)
    remove_tree(fs, root / "t")
    remove_tree(fs, root / "t")
    fs.write_file(root / "f", b"")
    remove_tree(fs, root / "f")
    assert fs.list_dir(root) == []


def test_allocated_bytes_count_what_lies_below(place: tuple[Fs, Path]) -> None:
    fs, root = place
    fs.make_dir(root / "d" / "deeper")
    assert fs.allocated_bytes(root / "d") == 0
    fs.write_file(root / "d" / "deeper" / "x", b"x" * 100_000)
    assert 100_000 <= fs.allocated_bytes(root / "d") <= 110_000


def test_disk_bytes_counts(place: tuple[Fs, Path]) -> None:
    fs, root = place
    total_bytes, free_bytes = fs.disk_bytes(root)
    assert 0 < free_bytes <= total_bytes


# --- what the fake forgets ------------------------------------------------------------------


def test_the_fake_loses_what_was_not_synced() -> None:
    fs, root = MemFs(), Path("/")
    fs.write_file(root / "named", b"synced")
    fs.sync_dir(root)
    fs.write_file(root / "unnamed", b"x")
    fs.sync_file(root / "unnamed")
    fs.write_file(root / "named", b"changed")
    after = fs.after(Fate())
    assert after.files_under(root) == {"named": 0}
    assert fs.after(NamesOnly()).files_under(root) == {"named": 0, "unnamed": 1}
    assert fs.after(Kill()).read_file(root / "named") == b"changed"
    assert fs.files_under(root) == {"named": 7, "unnamed": 1}


def test_the_fake_can_keep_both_names_or_none_of_a_move() -> None:
    fs, root = MemFs(), Path("/")
    fs.make_dir(root / "a")
    fs.make_dir(root / "b")
    fs.write_file(root / "a" / "f", b"x")
    for path in (root, root / "a"):
        fs.sync_dir(path)
    fs.rename(root / "a" / "f", root / "b" / "f")
    outcomes = {tuple(sorted(fs.after(Chance(seed)).files_under(root))) for seed in range(50)}
    assert outcomes == {("a/f",), ("b/f",), ("a/f", "b/f"), ()}


def test_the_fake_keeps_a_rename_within_a_directory_whole() -> None:
    fs, root = MemFs(), Path("/")
    fs.write_file(root / "a", b"old")
    replace_file(fs, root / "a", b"old")
    fs.write_file(temporary_name(root / "a"), b"new")
    fs.sync_file(temporary_name(root / "a"))
    fs.rename(temporary_name(root / "a"), root / "a")
    assert {fs.after(Chance(seed)).read_file(root / "a") for seed in range(50)} == {b"old", b"new"}


def test_the_fake_is_no_root() -> None:
    fs, root = MemFs(), Path("/")
    fs.make_dir(root / "d")
    fs.write_file(root / "d" / "f", b"", 0o444)
    fs.chmod(root / "d", 0o555)
    for change in (lambda: fs.unlink(root / "d" / "f"), lambda: fs.write_file(root / "d" / "f", b"x")):
        with pytest.raises(CachedError) as caught:
            change()
        assert caught.value.problem.reason == "STORE_DENIED"


# --- real files only ------------------------------------------------------------------------


def test_modes_do_not_depend_on_the_umask(tmp_path: Path) -> None:
    fs, before = RealFs(), os.umask(0o077)
    try:
        fs.make_dir(tmp_path / "d" / "private", 0o700)
        fs.write_file(tmp_path / "d" / "f", b"", 0o644)
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("d", "d/private", "d/f")]
    assert modes == [0o755, 0o700, 0o644]


def test_symbolic_links_are_seen_as_odd_and_never_followed(tmp_path: Path) -> None:
    fs = RealFs()
    outside = tmp_path / "outside"
    fs.make_dir(outside)
    fs.write_file(outside / "precious", b"x")
    fs.make_dir(tmp_path / "t")
    (tmp_path / "t" / "dir").symlink_to(outside)
    (tmp_path / "t" / "file").symlink_to(outside / "precious")
    assert fs.files_under(tmp_path / "t") == {"dir": -1, "file": -1}
    assert fs.size_bytes(tmp_path / "t" / "file") is None
    with pytest.raises(CachedError):
        fs.write_file(tmp_path / "t" / "file", b"overwritten")
    remove_tree(fs, tmp_path / "t")
    assert fs.read_file(outside / "precious") == b"x"


def test_a_lock_held_by_another_process_names_it_and_ends_with_it(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from cached.durable import lock_file\n"
    code += "lock_file(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    path = tmp_path / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(CachedError) as caught:
            lock_file(path)
        assert f"process {holder.pid}" in str(caught.value)
        assert caught.value.problem.kind is ErrorKind.PRECONDITION
        holder.kill()
        holder.wait()
    os.close(lock_file(path))


@pytest.mark.parametrize(
    ("number", "kind", "reason", "is_temporary"),
    [
        (errno.ENOSPC, ErrorKind.NO_ROOM, "DISK_FULL", True),
        (errno.EDQUOT, ErrorKind.NO_ROOM, "DISK_FULL", True),
        (errno.EACCES, ErrorKind.DENIED, "STORE_DENIED", False),
        (errno.EPERM, ErrorKind.DENIED, "STORE_DENIED", False),
        (errno.EROFS, ErrorKind.DENIED, "STORE_READ_ONLY", False),
        (errno.EIO, ErrorKind.FAILED, "STORE_IO", False),
    ],
)
def test_the_kernels_errors_have_words(
    tmp_path: Path, number: int, kind: ErrorKind, reason: str, is_temporary: bool
) -> None:
    problem = world_error(OSError(number, os.strerror(number)), tmp_path / "not" / "there").problem
    assert (problem.kind, problem.reason, problem.temporary) == (kind, reason, is_temporary)
    assert str(tmp_path / "not" / "there") in problem.message and problem.hint
    assert (f"bytes free at {tmp_path}" in problem.message) == (kind is ErrorKind.NO_ROOM)


def test_a_failed_fsync_is_no_error_to_live_with(tmp_path: Path) -> None:
    # A pipe cannot be synced; the kernel says so with the same call that reports a sick disk.
    with Partial.open(tmp_path / "p", tmp_path / "j", 1) as part:
        read_end, write_end = os.pipe()
        os.dup2(write_end, part._fd)
        os.close(read_end)
        os.close(write_end)
        with pytest.raises(FsyncFailed):
            part.seal()


# --- partial blobs --------------------------------------------------------------------------


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "0.part", tmp_path / "0.journal"


def test_a_partial_blob_reserves_writes_reads_and_seals(paths: tuple[Path, Path]) -> None:
    with Partial.open(*paths, 1000) as part:
        assert paths[0].stat().st_size == 1000 and paths[0].stat().st_blocks * 512 >= 1000
        part.write_at(memoryview(b"tail"), 996)
        part.write_at(memoryview(b"head"), 0)
        buffer = memoryview(bytearray(8))
        assert part.read_into(buffer, 996) == 4 and bytes(buffer[:4]) == b"tail"
        part.record("0 abc")
        part.record("done")
        part.seal()
        part.forget_cache()
        assert part.lines() == ["0 abc", "done"]
    assert paths[0].stat().st_mode & 0o777 == 0o444
    part.close()


def test_an_empty_blob_is_a_blob(paths: tuple[Path, Path]) -> None:
    with Partial.open(*paths, 0) as part:
        part.seal()
    assert paths[0].stat().st_size == 0


def test_writing_past_the_end_is_our_bug(paths: tuple[Path, Path]) -> None:
    with Partial.open(*paths, 10) as part, pytest.raises(AssertionError):
        part.write_at(memoryview(b"12"), 9)


def test_a_partial_blob_is_resumed_with_its_journal(paths: tuple[Path, Path]) -> None:
    with Partial.open(*paths, 10) as part:
        part.write_at(memoryview(b"kept"), 0)
        part.record("0 kept")
    with paths[1].open("ab") as journal:
        journal.write(b"1 torn off in the mid")
    with Partial.open(*paths, 10) as part:
        assert part.lines() == ["0 kept"]
        part.record("1 whole")
        assert part.lines() == ["0 kept", "1 whole"]
        buffer = memoryview(bytearray(4))
        part.read_into(buffer, 0)
        assert bytes(buffer) == b"kept"


def test_a_sealed_part_can_be_taken_up_again(paths: tuple[Path, Path]) -> None:
    with Partial.open(*paths, 4) as part:
        part.seal()
    with Partial.open(*paths, 4) as part:
        part.write_at(memoryview(b"more"), 0)
    assert paths[0].stat().st_mode & 0o200


def test_a_committed_blob_is_never_written_through_its_old_name(
    paths: tuple[Path, Path], tmp_path: Path
) -> None:
    with Partial.open(*paths, 4) as part:
        part.write_at(memoryview(b"good"), 0)
        part.record("0 good")
        part.seal()
    (tmp_path / "blob").hardlink_to(paths[0])
    with Partial.open(*paths, 4) as part:
        assert part.lines() == []
        part.write_at(memoryview(b"evil"), 0)
    assert (tmp_path / "blob").read_bytes() == b"good"
    assert (tmp_path / "blob").stat().st_mode & 0o777 == 0o444


def test_a_journal_without_its_part_is_forgotten(paths: tuple[Path, Path]) -> None:
    paths[1].write_text("0 of a part that is gone\n")
    with Partial.open(*paths, 4) as part:
        assert part.lines() == []


def test_a_part_of_another_length_is_fitted(paths: tuple[Path, Path]) -> None:
    for size_bytes in (100, 10, 50):
        with Partial.open(*paths, size_bytes):
            assert paths[0].stat().st_size == size_bytes


def test_two_workers_do_not_share_a_part(paths: tuple[Path, Path]) -> None:
    with Partial.open(*paths, 4):
        assert RealFs().is_locked(paths[0])
        with pytest.raises(CachedError) as caught:
            Partial.open(*paths, 4)
        assert caught.value.problem.reason == "INGEST_BUSY" and caught.value.problem.temporary
    Partial.open(*paths, 4).close()


def test_a_refused_open_leaves_nothing_open(paths: tuple[Path, Path]) -> None:
    paths[1].mkdir()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CachedError):
        Partial.open(*paths, 4)
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_cannot_fit_is_refused_and_gives_its_space_back(paths: tuple[Path, Path]) -> None:
    size_bytes = 1 << 62
    with pytest.raises(CachedError) as caught:
        Partial.open(*paths, size_bytes)
    assert caught.value.problem.reason in ("DISK_FULL", "STORE_IO")  # ENOSPC, or EFBIG by file system
    assert paths[0].stat().st_size == 0 and paths[0].stat().st_blocks == 0


def test_many_threads_record_whole_lines(paths: tuple[Path, Path]) -> None:
    with Partial.open(*paths, 4) as part:
        threads = [
            threading.Thread(target=lambda n=n: [part.record(f"{n} {i}") for i in range(50)])
            for n in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(part.lines()) == sorted(f"{n} {i}" for n in range(8) for i in range(50))


def test_complete_lines_drops_what_was_cut_off() -> None:
    assert complete_lines(b"a\nb\nc") == ["a", "b"]
    assert complete_lines(b"") == [] and complete_lines(b"c") == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system in namespaces of a process's own, where everybody may mount one.

    It is reached through that process, and goes with it.
    """
    script = 'mount -t tmpfs -o size=1m none "$1" && echo mounted && exec cat'
    command = ["unshare", "-Urm", "sh", "-c", script, "sh", str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        assert holder.stdout.readline() == b"mounted\n"
        yield Path(f"/proc/{holder.pid}/root{tmp_path}")
        holder.stdin.close()


def test_a_full_disk_is_refused_before_the_first_byte(small_disk: Path) -> None:
    fs = RealFs()
    free_bytes = fs.disk_bytes(small_disk)[1]
    with pytest.raises(CachedError) as caught:
        Partial.open(small_disk / "p", small_disk / "j", 64 << 20)
    problem = caught.value.problem
    assert (problem.kind, problem.reason) == (ErrorKind.NO_ROOM, "DISK_FULL")
    assert fs.disk_bytes(small_disk)[1] >= free_bytes - 8192
    with pytest.raises(CachedError) as caught:
        fs.write_file(small_disk / "f", bytes(2 << 20))
    assert caught.value.problem.reason == "DISK_FULL"


def test_a_lock_is_not_inherited_by_what_is_executed(tmp_path: Path) -> None:
    fd = lock_file(tmp_path / "lock")
    assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    os.close(fd)
