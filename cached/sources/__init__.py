"""Origins: what a ref resolves to, and the bytes of any range of its files.

Owns the words that every kind of origin answers to (``Source``, ``Reader``), and the choice of a
kind by the ref's scheme. A source checks what an origin says of itself (sizes, ranges, versions);
whether the content is right is proven by whoever puts it on disk. Sources know no disk layout, keep
no state but connections, and never retry: they say whether trying again can help.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping
from typing import Protocol

from cached.config import SourceSettings
from cached.model import ErrorKind, FileSpec, Ref, Revision, permanent
from cached.sources.filters import check_attested

OWN_SCHEMES = ("file", "hf", "http", "https", "oci", "s3")
MAX_SOURCES = 64
# These would read this machine's own files past the checks of file://,
_LOCAL = frozenset({"asynclocal", "data", "git", "local"})
# wrap another address that nobody has checked,
_WRAPPING = frozenset({"asyncwrapper", "blockcache", "cached", "dir", "filecache", "generic", "libarchive"})
_WRAPPING_TOO = frozenset({"reference", "simplecache", "tar", "zip"})
# or are another name of one of ours, or (oci) mean something else by ours.
_OURS = frozenset({"s3a", *OWN_SCHEMES})


Space = Callable[[], memoryview]
"""Gives the place for the next bytes: never empty, and as large as a piece may be."""


class RangesIgnoredError(Exception):
    """The origin answers a range with the whole file: it can only be read from start to end."""


class Reader(Protocol):
    """One file of a revision, as it was listed. Threads may read ranges at once."""

    def read(self, start: int, stop: int, space: Space) -> Generator[int, None, None]:
        """Bring the bytes from ``start`` to before ``stop``, piece by piece.

        Each step asks ``space`` where to, fills that from its beginning and says with how many bytes.
        The pieces follow one another and end exactly at ``stop``. Leaving early is fine. Raises
        RangesIgnoredError (never for the whole file), and CachedError: temporary where the connection broke;
        permanent, as ``ORIGIN_CHANGED``, where the file is not the one that was listed: only another
        revision can be had then.
        """

    def close(self) -> None: ...


class Source(Protocol):
    """A kind of origin."""

    def resolve(self, ref: Ref) -> Revision:
        """Ask the origin what ``ref`` is now. Raises CachedError."""

    def open(self, ref: Ref, spec: FileSpec) -> Reader:
        """Get ready to read a file of a revision of ``ref``. Raises CachedError."""

    def close(self) -> None: ...


class Origins:
    """One source for each scheme and settings, made when first needed; connections live as long as this."""

    def __init__(self, connections: int, timeout_s: float, env: Mapping[str, str] | None = None) -> None:
        """``env`` is where proxies, authorities and tokens are looked for: the process's, unless given."""
        self._connections = connections
        self._timeout_s = timeout_s
        self._env = os.environ if env is None else env
        self._made: dict[str, tuple[SourceSettings, Source]] = {}

    def resolve(self, ref: Ref, settings: SourceSettings | None = None) -> Revision:
        """What ``ref`` is now, as far as its settings allow it. Raises CachedError."""
        settings = settings or SourceSettings(ref)
        revision = self.source_for(ref, settings).resolve(ref)
        check_attested(revision, settings)
        return revision

    def source_for(self, ref: Ref, settings: SourceSettings | None = None) -> Source:
        """The source that answers for ``ref``. Raises CachedError (INVALID ``UNKNOWN_SCHEME``)."""
        kind = _kind_of(ref)
        # Where no table is about a ref, its settings are the defaults, and one source serves all such.
        settings = settings or SourceSettings(ref)
        settings = settings if settings != SourceSettings(ref) else SourceSettings(f"{kind}://")
        place = f"{kind} {settings.prefix}"
        if place in self._made and self._made[place][0] != settings:
            self._made.pop(place)[1].close()
        if place not in self._made:
            if len(self._made) == MAX_SOURCES:
                self._made.pop(next(iter(self._made)))[1].close()
            self._made[place] = (settings, self._make(kind, settings))
        return self._made[place][1]

    def _make(self, kind: str, settings: SourceSettings) -> Source:
        # Imported late: a worker that copies folders needs no HTTP, no TLS and no S3.
        match kind:
            case "file":
                from cached.sources.folder import FolderSource

                return FolderSource(settings)
            case "http" | "https":
                from cached.sources.http import HttpSource

                return HttpSource(settings, self._connections, self._timeout_s, self._env)
            case "hf":
                from cached.sources.hub import HubSource

                return HubSource(settings, self._connections, self._timeout_s, self._env)
            case "oci":
                from cached.sources.oci import OciSource

                return OciSource(settings, self._connections, self._timeout_s, self._env)
            case "s3":
                from cached.sources.s3 import S3Source

                return S3Source(settings, self._connections, self._timeout_s)
        from cached.sources.fsspec_source import FsspecSource

        return FsspecSource(settings, self._connections, self._timeout_s, self._env)

    def close(self) -> None:
        for _, source in self._made.values():
            source.close()
        self._made.clear()


def _kind_of(ref: Ref) -> str:
    scheme = ref.partition("://")[0]
    if scheme in OWN_SCHEMES:
        return scheme
    known = _fsspec_schemes()
    if scheme in known:
        return scheme
    raise permanent(
        ErrorKind.INVALID,
        "UNKNOWN_SCHEME",
        f"{ref}: there is no kind of origin {scheme!r}",
        f"known are {', '.join([*OWN_SCHEMES, *known])}",
    )


def _fsspec_schemes() -> tuple[str, ...]:
    """What fsspec can do besides, where it is installed."""
    try:
        import fsspec
    except ImportError:
        return ()
    found = set(fsspec.available_protocols()) - _LOCAL - _WRAPPING - _WRAPPING_TOO - _OURS
    # No scheme of an address has an underscore.
    return tuple(sorted(name for name in found if "_" not in name))
