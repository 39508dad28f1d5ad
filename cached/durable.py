"""The file system, with its promises spelled out: what is on disk once a call returns, and what is not.

Owns every call that changes the file system: whole small files, directories, links, locks, and the
partial blobs that fetch workers write into. A room that wants crash safety takes an ``Fs`` and can
be replayed on one that forgets what was not synced. Knows nothing of what the files mean, decides
nothing, keeps no state but open descriptors.

Two kinds of failure leave this room. The world's (a full disk, a denied path, a sick device) become
``CachedError`` naming path and cure. A failed fsync is ``FsyncFailed``: after it nobody can say what
is on the disk, so whoever sees it ends its process and starts again from what is there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Protocol, Self

from cached.model import CachedError, ErrorKind, permanent, temporary

DIR_MODE = 0o755
FILE_MODE = 0o644
SEALED_MODE = 0o444
DIRECT_BYTES = 4096
"""What writes past the page cache are aligned to: the largest block that disks commonly have."""
OPEN_TRIES = 3
"""A partial blob can lose its name between open and flock; more often than this it is no accident."""
RETRY_DISK_FULL_S = 5.0
RETRY_BUSY_S = 2.0


class FsyncFailed(Exception):
    """The kernel could not say that data is on disk. It may have dropped it: trying again proves nothing."""


class Fs(Protocol):
    """What the store needs of a file system. Nothing is durable before the sync that names it:

    ``sync_file`` makes a file's content durable, ``sync_dir`` the names in one directory (not the
    directory's own name, which is its parent's). Symbolic links are never followed at the end of a path.
    Every method raises CachedError for the world's errors.
    """

    def make_dir(self, path: Path, mode: int = DIR_MODE) -> None:
        """Make a directory and its parents; one that exists is left as it is."""

    def write_file(self, path: Path, data: bytes, mode: int = FILE_MODE) -> None:
        """Create a file or replace what is in it. Not atomic: use ``replace_file``."""

    def rename(self, source: Path, target: Path) -> None:
        """Atomic. Two names of one file stay as they are, as POSIX has it."""

    def link(self, source: Path, target: Path) -> None: ...

    def unlink(self, path: Path, missing_ok: bool = False) -> None: ...

    def rmdir(self, path: Path) -> None: ...

    def chmod(self, path: Path, mode: int) -> None: ...

    def touch(self, path: Path, at_unix_s: float) -> None: ...

    def sync_file(self, path: Path) -> None:
        """Raises FsyncFailed."""

    def sync_dir(self, path: Path) -> None:
        """Raises FsyncFailed."""

    def lock(self, path: Path) -> int:
        """As ``lock_file``; the answer is for ``unlock``."""

    def unlock(self, handle: int) -> None: ...

    def is_locked(self, path: Path) -> bool:
        """Whether anybody holds a flock on this file; False when it is absent."""

    def read_file(self, path: Path) -> bytes: ...

    def read_pieces(self, path: Path, piece_bytes: int) -> Iterator[memoryview]:
        """The content in order; each piece is valid only until the next one is asked for."""

    def list_dir(self, path: Path) -> list[str]:
        """Names in order; an absent directory is an error."""

    def files_under(self, path: Path) -> dict[str, int]:
        """Relative path to size in bytes of everything below that is no directory; -1 for odd things."""

    def allocated_bytes(self, path: Path) -> int:
        """What the regular files below a directory take on disk; what vanishes meanwhile takes nothing."""

    def size_bytes(self, path: Path) -> int | None:
        """None unless a regular file is there."""

    def is_dir(self, path: Path) -> bool: ...

    def modified_at(self, path: Path) -> float: ...

    def disk_bytes(self, path: Path) -> tuple[int, int]:
        """(total, free to us) of the file system that holds ``path``."""


# --- what is built from these ---------------------------------------------------------------


def temporary_name(path: Path) -> Path:
    """Where ``replace_file`` writes first. Hidden, so that a reader of the directory can tell it apart."""
    return path.with_name(f".{path.name}.tmp")


def is_temporary_name(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")


def replace_file(fs: Fs, path: Path, data: bytes, mode: int = FILE_MODE) -> None:
    """Durably put ``data`` under ``path``: old content or new is seen, by readers and after crashes."""
    scratch = temporary_name(path)
    fs.write_file(scratch, data, mode)
    fs.sync_file(scratch)
    fs.rename(scratch, path)
    fs.sync_dir(path.parent)


def remove_tree(fs: Fs, path: Path) -> None:
    """Remove a file, or a directory (a read-only one too) with all below it. Nothing there is fine."""
    if not fs.is_dir(path):
        fs.unlink(path, missing_ok=True)
        return
    fs.chmod(path, DIR_MODE)
    for name in fs.list_dir(path):
        remove_tree(fs, path / name)
    fs.rmdir(path)


def complete_lines(data: bytes) -> list[str]:
    """The lines of a journal. What follows the last newline was cut off by a crash and is dropped."""
    return data[: data.rfind(b"\n") + 1].decode("utf-8", "replace").splitlines()


def lock_file(path: Path) -> int:
    """Take the exclusive flock of a file (made if absent), write our pid into it, return the descriptor.

    Raises CachedError PRECONDITION ``STORE_LOCKED`` naming the holder's pid when it is taken.
    """
    with _world(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
    try:
        with _world(path):
            if not _try_flock(fd):
                _refuse_locked(path, os.pread(fd, 32, 0).strip().decode("ascii", "replace"))
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _refuse_locked(path: Path, pid: str) -> NoReturn:
    raise permanent(
        ErrorKind.PRECONDITION,
        "STORE_LOCKED",
        f"{path} is locked by process {pid or 'unknown'}: this directory is already served",
        "stop that process, or give this one a directory of its own",
    )


def _try_flock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# --- errors ---------------------------------------------------------------------------------


@contextlib.contextmanager
def _world(path: Path) -> Iterator[None]:
    """Turn what the kernel refuses into an error that names the path and the cure."""
    try:
        yield
    except OSError as error:
        raise world_error(error, path) from error


def world_error(error: OSError, path: Path) -> CachedError:
    """The CachedError for what the kernel said about ``path``."""
    said = error.strerror or str(error)
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return temporary(
                "DISK_FULL",
                f"no room to write {path}: {said} ({_free_words(path)})",
                "free space on this file system, or lower the store's capacity below what is free",
                RETRY_DISK_FULL_S,
                ErrorKind.NO_ROOM,
            )
        case errno.EACCES | errno.EPERM:
            return permanent(
                ErrorKind.DENIED,
                "STORE_DENIED",
                f"uid {os.geteuid()} may not use {path}: {said}",
                "give the directory to the user that the daemon runs as",
            )
        case errno.EROFS:
            return permanent(
                ErrorKind.DENIED,
                "STORE_READ_ONLY",
                f"{path} is on a read-only file system",
                "mount it writable; an error can turn a file system read-only, see the kernel's log",
            )
    return permanent(
        ErrorKind.FAILED,
        "STORE_IO",
        f"{path}: {said}",
        "see the kernel's log for errors of the disk, and whether anything else changes this directory",
    )


def _free_words(path: Path) -> str:
    for place in (path, *path.parents):
        with contextlib.suppress(OSError):
            found = os.statvfs(place)
            return f"{found.f_bavail * found.f_frsize} bytes free at {place}"
    return "free space unknown"


def _fsync(fd: int, path: Path) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        raise FsyncFailed(f"fsync of {path} failed: {error.strerror}") from error


# --- the real one ---------------------------------------------------------------------------


class RealFs:
    """The kernel's file system. Modes are exact, whatever the umask."""

    def make_dir(self, path: Path, mode: int = DIR_MODE) -> None:
        if self.is_dir(path):
            return
        if path.parent != path:
            self.make_dir(path.parent)
        with _world(path):
            path.mkdir(exist_ok=True)
            path.chmod(mode)

    def write_file(self, path: Path, data: bytes, mode: int = FILE_MODE) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with _world(path), _closing(os.open(path, flags, mode)) as fd:
            os.fchmod(fd, mode)
            _write_all(fd, memoryview(data), 0)

    def rename(self, source: Path, target: Path) -> None:
        with _world(source):
            source.rename(target)

    def link(self, source: Path, target: Path) -> None:
        with _world(target):
            os.link(source, target, follow_symlinks=False)

    def unlink(self, path: Path, missing_ok: bool = False) -> None:
        with _world(path):
            path.unlink(missing_ok=missing_ok)

    def rmdir(self, path: Path) -> None:
        with _world(path):
            path.rmdir()

    def chmod(self, path: Path, mode: int) -> None:
        with _world(path):
            path.chmod(mode)

    def touch(self, path: Path, at_unix_s: float) -> None:
        with _world(path):
            os.utime(path, (at_unix_s, at_unix_s))

    def sync_file(self, path: Path) -> None:
        with _world(path), _closing(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)) as fd:
            _fsync(fd, path)

    def sync_dir(self, path: Path) -> None:
        with _world(path), _closing(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
            _fsync(fd, path)

    def lock(self, path: Path) -> int:
        return lock_file(path)

    def unlock(self, handle: int) -> None:
        os.close(handle)

    def is_locked(self, path: Path) -> bool:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise world_error(error, path) from error
        with _closing(fd):
            return not _try_flock(fd)

    def read_file(self, path: Path) -> bytes:
        with _world(path):
            return path.read_bytes()

    def read_pieces(self, path: Path, piece_bytes: int) -> Iterator[memoryview]:
        view = memoryview(bytearray(piece_bytes))  # one buffer for all: fresh memory costs more than the disk
        with _world(path), _closing(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)) as fd:
            while count := os.readv(fd, [view]):
                yield view[:count]

    def list_dir(self, path: Path) -> list[str]:
        with _world(path):
            return sorted(os.listdir(path))

    def files_under(self, path: Path) -> dict[str, int]:
        found: dict[str, int] = {}
        with _world(path):
            _collect(str(path), "", found)
        return found

    def allocated_bytes(self, path: Path) -> int:
        with _world(path):
            return _allocated_bytes(str(path))

    def size_bytes(self, path: Path) -> int | None:
        found = _lstat(path)
        return found.st_size if found is not None and stat.S_ISREG(found.st_mode) else None

    def is_dir(self, path: Path) -> bool:
        found = _lstat(path)
        return found is not None and stat.S_ISDIR(found.st_mode)

    def modified_at(self, path: Path) -> float:
        with _world(path):
            return path.lstat().st_mtime

    def disk_bytes(self, path: Path) -> tuple[int, int]:
        with _world(path):
            found = os.statvfs(path)
        return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


def _lstat(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise world_error(error, path) from error


def _collect(directory: str, prefix: str, found: dict[str, int]) -> None:
    # Plain strings and scandir: a start with a thousand artifacts goes through here for every file.
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _collect(entry.path, f"{prefix}{entry.name}/", found)
            elif entry.is_file(follow_symlinks=False):
                found[prefix + entry.name] = entry.stat(follow_symlinks=False).st_size
            else:
                found[prefix + entry.name] = -1


def _allocated_bytes(directory: str) -> int:
    found_bytes = 0
    # Workers write here meanwhile: a name may be gone by the time it is looked at.
    with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                if entry.is_dir(follow_symlinks=False):
                    found_bytes += _allocated_bytes(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    found_bytes += entry.stat(follow_symlinks=False).st_blocks * 512
    return found_bytes


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def _write_all(fd: int, view: memoryview, offset: int) -> None:
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


# --- one partial blob -----------------------------------------------------------------------


class Partial:
    """A blob while a worker fetches it, flocked against every other worker, and the journal beside it.

    Threads may write, read and record at once. The journal is not synced line by line: whoever resumes
    proves each line against the bytes, so one that a power cut took costs a fetch and nothing else.
    """

    __slots__ = ("_direct_fd", "_fd", "_journal_fd", "_journal_path", "_path", "size_bytes")

    def __init__(
        self, path: Path, journal_path: Path, fd: int, journal_fd: int, direct_fd: int, size_bytes: int
    ) -> None:
        """For ``open`` only."""
        self._path, self._journal_path = path, journal_path
        self._fd, self._journal_fd, self._direct_fd = fd, journal_fd, direct_fd
        self.size_bytes = size_bytes

    @classmethod
    def open(cls, part_path: Path, journal_path: Path, size_bytes: int, direct: bool = False) -> Self:
        """Take or make the partial blob, with all its space reserved.

        ``direct`` writes past the page cache whatever lies on block borders, in file and in memory, where
        the file system can do that. Raises CachedError: ``INGEST_BUSY`` (temporary) while another process
        has it, ``DISK_FULL`` (NO_ROOM) when the space is not there.
        """
        fd, made = _open_part(part_path)
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, fd)
            with _world(part_path):
                _reserve(fd, size_bytes)
            with _world(journal_path):
                journal_fd = _open_journal(journal_path, anew=made)
            undo.callback(os.close, journal_fd)
            with _world(part_path):
                direct_fd = _open_direct(part_path) if direct else -1
            undo.pop_all()
        return cls(part_path, journal_path, fd, journal_fd, direct_fd, size_bytes)

    def write_at(self, view: memoryview, offset_bytes: int) -> None:
        assert offset_bytes >= 0 and offset_bytes + view.nbytes <= self.size_bytes
        view = view.cast("B")
        with _world(self._path):
            done = self._write_direct(view, offset_bytes)
            _write_all(self._fd, view[done:], offset_bytes + done)

    def _write_direct(self, view: memoryview, offset_bytes: int) -> int:
        """The number of bytes from the front that went past the page cache."""
        whole = len(view) - len(view) % DIRECT_BYTES
        if self._direct_fd < 0 or offset_bytes % DIRECT_BYTES or not whole:
            return 0
        try:
            _write_all(self._direct_fd, view[:whole], offset_bytes)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return 0  # this place in memory is not aligned, or the device wants larger blocks
        return whole

    def read_into(self, view: memoryview, offset_bytes: int) -> int:
        """The number of bytes read: fewer than asked for only at the end of the file."""
        done, view = 0, view.cast("B")
        with _world(self._path):
            while done < len(view) and (count := os.preadv(self._fd, [view[done:]], offset_bytes + done)):
                done += count
        return done

    def record(self, line: str) -> None:
        """Append one line to the journal, in one write."""
        assert "\n" not in line
        data = line.encode() + b"\n"
        with _world(self._journal_path):
            if os.write(self._journal_fd, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def lines(self) -> list[str]:
        """The journal's complete lines."""
        with _world(self._journal_path):
            return complete_lines(self._journal_path.read_bytes())

    def sync(self) -> None:
        """Make durable what is written, then what the journal says of it. Raises FsyncFailed."""
        _fsync(self._fd, self._path)
        _fsync(self._journal_fd, self._journal_path)

    def seal(self) -> None:
        """Make content and journal durable, and the blob read-only. Raises FsyncFailed."""
        with _world(self._path):
            os.fchmod(self._fd, SEALED_MODE)
        self.sync()

    def forget_cache(self) -> None:
        """Let the kernel drop the pages: nobody waits for them, and others on this node use the memory."""
        with _world(self._path):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Give up the flock. Calling it again does nothing."""
        fds = (self._fd, self._journal_fd, self._direct_fd)
        self._fd = self._journal_fd = self._direct_fd = -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open_part(path: Path) -> tuple[int, bool]:
    """The flocked descriptor of the file that has this name now, and whether it holds nothing yet."""
    for _ in range(OPEN_TRIES):
        with _world(path):
            access = os.O_RDWR if _unseal(path) else os.O_RDONLY
            fd = os.open(path, access | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
            with contextlib.ExitStack() as undo:
                undo.callback(os.close, fd)
                if not _try_flock(fd):
                    raise _busy(path)
                found = os.fstat(fd)
                if found.st_nlink == 1 and access == os.O_RDWR:
                    undo.pop_all()
                    return fd, found.st_size == 0
                if found.st_nlink > 1:
                    path.unlink(missing_ok=True)
    raise _busy(path)


def _unseal(path: Path) -> bool:
    """Whether the file may be opened for writing."""
    # A worker that died between sealing and reporting left a read-only file, which only root could open
    # for writing. A file with a second name is a committed blob whose old name outlived a power cut: it
    # stays sealed, and _open_part gives up this name for it.
    found = _lstat(path)
    if found is None or found.st_mode & stat.S_IWUSR:
        return True
    if found.st_nlink == 1:
        path.chmod(FILE_MODE)
    return found.st_nlink == 1


def _busy(path: Path) -> CachedError:
    return temporary(
        "INGEST_BUSY",
        f"{path} is being written by another process",
        "wait: a worker that an earlier daemon left behind ends by itself",
        RETRY_BUSY_S,
    )


def _reserve(fd: int, size_bytes: int) -> None:
    had_bytes = min(size_bytes, os.fstat(fd).st_size)
    os.ftruncate(fd, had_bytes)
    if size_bytes == 0:
        return
    try:
        os.posix_fallocate(fd, 0, size_bytes)
    except OSError as error:
        # A refused reservation keeps what it got so far: give that back, or the disk stays full.
        os.ftruncate(fd, had_bytes)
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(fd, size_bytes)  # this file system cannot reserve: a full disk shows when written


def _open_direct(path: Path) -> int:
    """A descriptor that writes past the page cache; -1 where this file system has only its cache."""
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return -1


def _open_journal(path: Path, anew: bool) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags | (os.O_TRUNC if anew else 0), FILE_MODE)
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, fd)
        # A torn last line would swallow the next one.
        os.ftruncate(fd, path.read_bytes().rfind(b"\n") + 1)
        undo.pop_all()
    return fd
