"""Re-proving blobs on disk against their names.

Owns the reading. Reads past the page cache where the file system lets it: what is in question is the
disk, and what others have cached stays cached. (So a page that went bad in the cache alone is not found here;
what stands in memory is proven by its chunk digests.) Changes nothing; the store acts on what is found.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
from collections.abc import Callable
from pathlib import Path

from cached.durable import world_error
from cached.fetch.wire import Mismatch
from cached.model import Digest

BUFFER_BYTES = 1024 * 1024
REPORT_BYTES = 64 * 1024 * 1024
_CACHED = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
"""Of the errors that a read can give, those that are about the content and not about this process."""
_BAD_CONTENT = {errno.EIO, errno.EUCLEAN, errno.EBADMSG}


def verify(
    files: tuple[tuple[str, Digest, int], ...],
    advanced: Callable[[int], None],
    paced: Callable[[int], None] = lambda _: None,
) -> tuple[Mismatch, ...]:
    """Each (path, sha256, size in bytes) that is not so, and why. ``advanced`` hears the bytes read so far;
    ``paced`` is called with the bytes of each read and may hold it up.

    Raises CachedError where a file cannot be read for a reason that says nothing about its content.
    """
    found: list[Mismatch] = []
    # Page-aligned, as reading past the cache needs.
    with mmap.mmap(-1, BUFFER_BYTES) as buffer, memoryview(buffer) as view:
        reading = _Reading(view, advanced, paced)
        for path, digest, size_bytes in files:
            reason = _wrong_about(reading, Path(path), digest, size_bytes)
            if reason is not None:
                found.append(Mismatch(digest, reason))
        reading.report()
    return tuple(found)


class _Reading:
    """The reused buffer, and how much went through it."""

    def __init__(
        self, view: memoryview, advanced: Callable[[int], None], paced: Callable[[int], None]
    ) -> None:
        self._view = view
        self._advanced = advanced
        self._paced = paced
        self._done_bytes = 0
        self._reported_bytes = 0

    def sha256(self, fd: int, size_bytes: int) -> str:
        digest = hashlib.sha256()
        position = 0
        while position < size_bytes and (count := os.preadv(fd, [self._view], position)):
            digest.update(self._view[:count])
            position += count
            self._done_bytes += count
            self._paced(count)
            if self._done_bytes - self._reported_bytes >= REPORT_BYTES:
                self.report()
        return digest.hexdigest()

    def report(self) -> None:
        self._advanced(self._done_bytes)
        self._reported_bytes = self._done_bytes


def _wrong_about(reading: _Reading, path: Path, digest: Digest, size_bytes: int) -> str | None:
    try:
        fd = _open_uncached(path)
        try:
            found_bytes = os.fstat(fd).st_size
            if found_bytes != size_bytes:
                return f"{path} has {found_bytes} bytes and should have {size_bytes}"
            found = reading.sha256(fd, size_bytes)
        finally:
            os.close(fd)
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        if error.errno not in _BAD_CONTENT:
            raise world_error(error, path) from error
        return f"{path} cannot be read: {error.strerror}"
    return None if found == digest else f"{path} has the sha256 {found} and should have {digest}"


def _open_uncached(path: Path) -> int:
    try:
        return os.open(path, _CACHED | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, _CACHED)  # this file system reads only through its cache
