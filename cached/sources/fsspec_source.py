"""Any other scheme (``ftp://``, ``sftp://``, ``gs://``, ...): a folder of whatever fsspec has a library for.

Owns the reading of such folders through fsspec's words. They are read at the pace of their library, with
fresh memory for each piece: this is the long tail. Nobody vouches for the content but SHA256SUMS beside the
files; what tells two contents of one name apart is the best that the library tells (tag, else time).
"""

from __future__ import annotations

import contextlib
import datetime
import threading
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import fsspec

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
from cached.sources.secrets import options_of
from cached.sources.sums import MAX_SUMS_BYTES, SUMS_NAME, check_names, parse_sums

MAX_FOLDERS = 10_000
PIECE_BYTES = 4 * 1024 * 1024
"""What the library is asked for at once: each time may be a request of its own."""
RETRY_S = 2.0

# What libraries call a name of the content itself, and what they call the time of the last change. Not
# fsspec's own ``ukey``: of most it covers everything that is known of a file, the time of the last read too.
_TAGS = ("ETag", "etag", "content_md5", "md5Hash", "generation", "crc32c")
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "modify", "modified", "created")


class FsspecSource:
    """Thread-safe, although many of these libraries are not: each thread borrows a file system of its own."""

    def __init__(
        self, settings: SourceSettings, connections: int, timeout_s: float, env: Mapping[str, str]
    ) -> None:
        del connections, timeout_s  # each library has its own words for these: they can be given as options
        self._settings = settings
        self._env = env
        self._lock = threading.Lock()
        self._idle: dict[str, list[Any]] = {}

    def resolve(self, ref: Ref) -> Revision:
        """What SHA256SUMS lists, or without it every file below the folder, unattested."""
        with self.borrowed(ref) as fs:
            # A library may remember what was there the last time.
            fs.invalidate_cache()
            root = _root(fs, ref)
            listing = _sums(fs, root, ref)
            if listing is None:
                listing = dict.fromkeys(_walk(fs, root, ref))
            chosen = sorted(select(listing, self._settings, ref))
            files = tuple(_spec(fs, root, path, listing[path], ref) for path in chosen)
        return Revision(ref, revision_key(ref, files), files)

    def open(self, ref: Ref, spec: FileSpec) -> FsspecReader:
        return FsspecReader(self, ref, spec)

    def close(self) -> None:
        # Each closes its connection when nothing refers to it any more.
        self._idle.clear()

    @contextlib.contextmanager
    def borrowed(self, ref: Ref, path: str = "") -> Iterator[Any]:
        """A file system for one thread; what goes wrong with it becomes a CachedError about ``path``."""
        with _errors(ref + path):
            fs = self._take(ref)
            # One that something went wrong with is not used again: who knows what it waits for.
            yield fs
        with self._lock:
            self._idle.setdefault(_host(ref), []).append(fs)

    def _take(self, ref: Ref) -> Any:
        with self._lock:
            idle = self._idle.get(_host(ref))
            if idle:
                return idle.pop()
        options = options_of(self._settings, self._env)
        try:
            return fsspec.core.url_to_fs(ref, skip_instance_cache=True, **options)[0]
        except ImportError as error:
            raise permanent(
                ErrorKind.FAILED,
                "MISSING_LIBRARY",
                f"{ref}: fsspec needs another library for it: {error}",
                "install it where the daemon runs",
            ) from error
        except (TypeError, ValueError) as error:
            raise permanent(
                ErrorKind.INVALID,
                "BAD_SOURCE",
                f"{ref}: fsspec takes neither this address nor these options: {error}"[:500],
                f"correct the options of source {self._settings.prefix!r}; they are those of fsspec's class",
            ) from error


class FsspecReader:
    """Each range is read from a file opened anew, by a file system that no other thread uses meanwhile."""

    def __init__(self, source: FsspecSource, ref: Ref, spec: FileSpec) -> None:
        self._source = source
        self._ref = ref
        self._spec = spec

    def read(self, start: int, stop: int, space: Space) -> Generator[int, None, None]:
        assert 0 <= start < stop <= self._spec.size_bytes
        with self._source.borrowed(self._ref, self._spec.path) as fs:
            self._check_unchanged(fs)
            path = f"{_root(fs, self._ref)}/{self._spec.path}"
            position = start
            for piece in _pieces(fs, path, start, stop):
                position += len(piece)
                if position > stop:
                    raise self._wrong_count(position - start, stop - start)
                rest = memoryview(piece)
                while rest:
                    view = space()
                    count = min(len(rest), len(view))
                    view[:count] = rest[:count]
                    yield count
                    rest = rest[count:]
            # What was read while somebody wrote is neither the old content nor the new.
            self._check_unchanged(fs)
            if position < stop:
                raise self._wrong_count(position - start, stop - start)

    def close(self) -> None:
        """File systems belong to the source."""

    def _check_unchanged(self, fs: Any) -> None:
        fs.invalidate_cache()
        found = _spec(fs, _root(fs, self._ref), self._spec.path, None, self._ref)
        if (found.size_bytes, found.version) != (self._spec.size_bytes, self._spec.version):
            raise permanent(
                ErrorKind.FAILED,
                ORIGIN_CHANGED,
                f"{self._ref}{self._spec.path} was changed after it was listed: it had "
                f"{self._spec.size_bytes} bytes ({self._spec.version}), and has {found.size_bytes} "
                f"({found.version})",
                "ask again, and it is listed anew; better, write each version into a folder of its own",
            )

    def _wrong_count(self, got_bytes: int, asked_bytes: int) -> CachedError:
        return temporary(
            "ORIGIN_BROKE_OFF",
            f"{self._ref}{self._spec.path}: {asked_bytes} bytes were asked for, and {got_bytes} came",
            "see the origin's log; it is asked again",
            RETRY_S,
        )


def _pieces(fs: Any, path: str, start: int, stop: int) -> Iterator[bytes]:
    """The bytes from ``start`` to before ``stop``; fewer where the file ends before."""
    if fs.async_impl:
        # One request for exactly that, where an open file would read ahead.
        for position in range(start, stop, PIECE_BYTES):
            yield fs.cat_file(path, start=position, end=min(position + PIECE_BYTES, stop))
        return
    with fs.open(path, "rb") as file:
        if hasattr(file, "readv"):
            # Of SFTP: asks for all of it at once, where ``read`` waits for every 32 KiB before the next.
            positions = range(start, stop, PIECE_BYTES)
            yield from file.readv([(at, min(PIECE_BYTES, stop - at)) for at in positions])
            return
        file.seek(start)
        while start < stop and (piece := file.read(min(PIECE_BYTES, stop - start))):
            yield piece
            start += len(piece)


def _host(ref: Ref) -> str:
    """What one file system is for."""
    return "/".join(ref.split("/", 3)[:3])


def _root(fs: Any, ref: Ref) -> str:
    return str(fs._strip_protocol(ref)).rstrip("/")


def _sums(fs: Any, root: str, ref: Ref) -> dict[str, Digest | None] | None:
    try:
        fs.info(f"{root}/{SUMS_NAME}")
    except FileNotFoundError:
        return None
    with fs.open(f"{root}/{SUMS_NAME}", "rb") as file:
        return dict(parse_sums(file.read(MAX_SUMS_BYTES + 1), ref + SUMS_NAME))


def _walk(fs: Any, root: str, ref: Ref) -> list[str]:
    paths: list[str] = []
    walking = fs.walk(root or fs.root_marker, detail=True, on_error="raise")
    for number, (_, _, files) in enumerate(walking, 1):
        paths += [_under(root, str(info["name"]), ref) for info in files.values()]
        if len(paths) > MAX_FILES or number > MAX_FOLDERS:
            raise permanent(
                ErrorKind.FAILED,
                "TOO_MANY_FILES",
                f"{ref} holds more than {MAX_FILES} files or {MAX_FOLDERS} folders",
                "name the model's own folder",
            )
    check_names(paths, ref)
    return paths


def _under(root: str, name: str, ref: Ref) -> str:
    if not name.startswith(root + "/"):
        raise permanent(
            ErrorKind.FAILED,
            "BAD_LISTING",
            f"{ref}: the listing has {name[:120]!r}, which is not in the folder",
            "put SHA256SUMS beside the files: it is the listing then",
        )
    return name.removeprefix(root + "/")


def _spec(fs: Any, root: str, path: str, digest: Digest | None, ref: Ref) -> FileSpec:
    with _errors(ref + path):
        info: Mapping[str, Any] = fs.info(f"{root}/{path}")
    size = info.get("size")
    if info.get("type") != "file" or not isinstance(size, int):
        raise permanent(
            ErrorKind.FAILED,
            "NOT_A_FILE",
            f"{ref}{path} is a {info.get('type')} of {size} bytes and not a file of known size",
            "remove it from the model's folder",
        )
    return FileSpec(path, size, digest, _version(info))


def _version(info: Mapping[str, Any]) -> str:
    for key in (*_TAGS, *_TIMES):
        value = info.get(key)
        if value:
            shown = value.isoformat() if isinstance(value, datetime.datetime) else str(value)
            return f"{key}={shown}"[:200]
    return ""


@contextlib.contextmanager
def _errors(url: str) -> Iterator[None]:
    try:
        yield
    except CachedError:
        raise
    # Each library has errors of its own, and no two have a parent in common.
    except Exception as error:
        raise _error(error, url) from error


def _error(error: Exception, url: str) -> CachedError:
    said = f"{url}: {type(error).__name__}: {error}"[:500]
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return permanent(
            ErrorKind.NOT_FOUND,
            "MISSING_FILE",
            f"{url} is missing at the origin",
            f"put it there, take it out of {SUMS_NAME}, or correct the ref",
        )
    if _is_denial(error):
        return permanent(
            ErrorKind.DENIED,
            "ORIGIN_DENIED",
            said,
            "give the credentials as options in the [[source]] of this prefix, or correct them",
        )
    hint = "check that the origin runs, and that this node reaches it; it is asked again"
    return temporary("ORIGIN_UNREACHABLE", said, hint, RETRY_S)


def _is_denial(error: Exception) -> bool:
    codes = {str(getattr(error, name, "")) for name in ("code", "status", "status_code")}
    return (
        isinstance(error, PermissionError)
        or bool(codes & {"401", "403"})
        or "Authentication" in type(error).__name__
        # FTP's "not logged in"; its library tells it from the others by nothing else.
        or (type(error).__module__ == "ftplib" and str(error).startswith("530"))
    )
