"""``file:///dir``: a folder on this machine, or on a share that is mounted here, as an origin.

Owns the reading of such folders. Files are copied, never linked: who owns the folder may change it
at any time. Follows no link out of the folder, opens nothing but regular files, writes nothing.
"""

from __future__ import annotations

import errno
import os
import stat
import urllib.parse
from collections.abc import Generator, Iterator
from pathlib import Path

from cached.config import SourceSettings
from cached.model import (
    MAX_FILES,
    ORIGIN_CHANGED,
    CachedError,
    Digest,
    ErrorKind,
    FileSpec,
    Ref,
    Revision,
    permanent,
    revision_key,
    temporary,
)
from cached.sources import Space
from cached.sources.filters import select
from cached.sources.sums import MAX_SUMS_BYTES, SUMS_NAME, check_names, parse_sums

MAX_FOLDERS = 10_000
RETRY_S = 2.0


class FolderSource:
    def __init__(self, settings: SourceSettings) -> None:
        self._settings = settings

    def resolve(self, ref: Ref) -> Revision:
        """The files that SHA256SUMS lists, or without it every file below the folder, unattested."""
        root = _root(ref)
        if not root.is_dir():
            raise permanent(
                ErrorKind.NOT_FOUND,
                "NO_SUCH_FOLDER",
                f"{ref}: there is no folder {root} that this process can see",
                "check the path, and that it is mounted where the daemon runs",
            )
        listing = _listing(root)
        chosen = select((path for path, _ in listing), self._settings, ref)
        files = tuple(_spec(root, path, digest) for path, digest in listing if path in chosen)
        return Revision(ref, revision_key(ref, files), files)

    def open(self, ref: Ref, spec: FileSpec) -> FolderReader:
        root = _root(ref)
        fd = _open_inside(root, spec.path)
        return FolderReader(root / spec.path, fd, spec)

    def close(self) -> None:
        """Nothing is kept open."""


class FolderReader:
    """One open file; reads at offsets, so threads share the descriptor."""

    def __init__(self, path: Path, fd: int, spec: FileSpec) -> None:
        self._path = path
        self._fd = fd
        self._spec = spec

    def read(self, start: int, stop: int, space: Space) -> Generator[int, None, None]:
        self._check_unchanged()
        position = start
        while position < stop:
            try:
                count = os.preadv(self._fd, [space()[: stop - position]], position)
            except OSError as error:
                raise _os_error(error, self._path) from error
            if count == 0:
                raise _changed(self._path, f"it had {self._spec.size_bytes} bytes and ends at {position} now")
            yield count
            position += count
        # What was read while somebody wrote is neither the old content nor the new.
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        found = _version(os.fstat(self._fd))
        if found != self._spec.version:
            raise _changed(self._path, f"its mtime_ns:size was {self._spec.version} and is {found}")

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _root(ref: Ref) -> Path:
    path = urllib.parse.unquote(ref.removeprefix("file://"))
    # Percent signs can hide what the ref's own check would have refused.
    if "\0" in path or ".." in path.split("/"):
        raise permanent(ErrorKind.INVALID, "BAD_REF", f"{ref!r} names no plain folder", "write file:///dir")
    return Path(path)


def _listing(root: Path) -> list[tuple[str, Digest | None]]:
    """Every file's path and, where the folder vouches for its content, the sha256; in path order."""
    sums = root / SUMS_NAME
    if not os.path.lexists(sums):
        paths = sorted(_walk(root))
        check_names(paths, str(root))
        return [(path, None) for path in paths]
    with os.fdopen(_open_inside(root, SUMS_NAME), "rb") as file:
        return list(parse_sums(file.read(MAX_SUMS_BYTES + 1), str(sums)).items())


def _walk(root: Path) -> Iterator[str]:
    found = 0
    for number, (folder, folders, names) in enumerate(os.walk(root, onerror=_raise), 1):
        for name in folders:
            if Path(folder, name).is_symlink():
                raise _unsafe_link(Path(folder, name), "links to folders are not followed")
        found += len(names)
        if found > MAX_FILES or number > MAX_FOLDERS:
            raise permanent(
                ErrorKind.FAILED,
                "TOO_MANY_FILES",
                f"{root} holds more than {MAX_FILES} files or {MAX_FOLDERS} folders",
                "name the model's own folder",
            )
        for name in names:
            yield Path(folder, name).relative_to(root).as_posix()


def _raise(error: OSError) -> None:
    raise _os_error(error, Path(error.filename or "?")) from error


def _spec(root: Path, path: str, digest: Digest | None) -> FileSpec:
    fd = _open_inside(root, path)
    try:
        found = os.fstat(fd)
    finally:
        os.close(fd)
    return FileSpec(path, found.st_size, digest, _version(found))


def _open_inside(root: Path, path: str) -> int:
    """A descriptor of a regular file that lies under ``root`` when every link is followed."""
    shown = root / path
    try:
        target = shown.resolve(strict=True)
        if not target.is_relative_to(root.resolve()):
            raise _unsafe_link(shown, f"it leads to {target}, outside the folder")
        # Looked at before it is opened, as opening a device can do something; and not to block, as a named
        # pipe that comes in its place would be waited for without end.
        _check_regular(shown, target.lstat())
        fd = os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _os_error(error, shown) from error
    except RuntimeError as error:
        raise _unsafe_link(shown, "its links go in a circle") from error
    try:
        _check_regular(shown, os.fstat(fd))
    except CachedError:
        os.close(fd)
        raise
    return fd


def _check_regular(shown: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise permanent(
            ErrorKind.FAILED,
            "NOT_A_FILE",
            f"{shown} is not a regular file",
            "remove it from the model's folder",
        )


def _version(found: os.stat_result) -> str:
    return f"{found.st_mtime_ns}:{found.st_size}"


def _changed(path: Path, what: str) -> CachedError:
    return permanent(
        ErrorKind.FAILED,
        ORIGIN_CHANGED,
        f"{path} was changed after it was listed: {what}",
        "ask again, and it is listed anew; better, write each version into a folder of its own",
    )


def _unsafe_link(path: Path, why: str) -> CachedError:
    return permanent(
        ErrorKind.DENIED, "UNSAFE_LINK", f"{path} is refused: {why}", "put the file itself into the folder"
    )


def _os_error(error: OSError, path: Path) -> CachedError:
    said = error.strerror or str(error)
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return permanent(
                ErrorKind.NOT_FOUND,
                "MISSING_FILE",
                f"{path} is missing at the origin",
                f"put it there, or take it out of {SUMS_NAME}",
            )
        case errno.EACCES | errno.EPERM:
            return permanent(
                ErrorKind.DENIED,
                "ORIGIN_DENIED",
                f"{path}: {said}",
                "let the user that the daemon runs as read it",
            )
        case errno.ELOOP:
            return _unsafe_link(path, "it is a link where a file was, or its links go in a circle")
    return temporary(
        "ORIGIN_IO", f"{path}: {said}", "see whether the disk or the share that it is on is well", RETRY_S
    )
