"""Origins: what a ref resolves to, and the bytes of any range of its files.

Owns the words that every kind of origin answers to (``Source``, ``Reader``), and the choice of a
kind by the ref's scheme. A source checks what an origin says of itself (sizes, ranges, versions);
whether the content is right is proven by whoever puts it on disk. Sources know no disk layout, keep
no state but connections, and never retry: they say whether trying again can help.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol

from cached.model import FileSpec, Ref, Revision


class RangesIgnoredError(Exception):
    """The origin answers a range with the whole file: it can only be read from start to end."""


class Reader(Protocol):
    """One file of a revision, as it was listed. Threads may read ranges at once."""

    def read(self, start: int, stop: int, view: memoryview) -> Generator[int, None, None]:
        """Bring the bytes from ``start`` to before ``stop``, piece by piece.

        Each step fills ``view`` from its beginning and says with how many bytes; the next step
        overwrites them. The pieces follow one another and end exactly at ``stop``. Leaving early is
        fine. Raises RangesIgnoredError (never for the whole file), and CachedError: temporary where the
        connection broke; permanent, as ``ORIGIN_CHANGED``, where the file is not the one that was listed:
        only another revision can be had then.
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
    """One source of each kind, made when first needed; connections live as long as this."""

    def __init__(self, connections: int, timeout_s: float) -> None:
        self._connections = connections
        self._timeout_s = timeout_s
        self._by_kind: dict[str, Source] = {}

    def source_for(self, ref: Ref) -> Source:
        kind = "file" if ref.startswith("file://") else "http"
        if kind not in self._by_kind:
            self._by_kind[kind] = self._make(kind)
        return self._by_kind[kind]

    def _make(self, kind: str) -> Source:
        if kind == "file":
            from cached.sources.folder import FolderSource

            return FolderSource()
        # Imported late: a worker that copies folders needs no HTTP and no TLS.
        from cached.sources.http import HttpSource

        return HttpSource(self._connections, self._timeout_s)

    def close(self) -> None:
        for source in self._by_kind.values():
            source.close()
