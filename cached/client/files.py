"""The bytes of an acquired model as open files: descriptors that were received, or paths below its directory.

Owns those descriptors. Maps and reads nothing; knows neither torch nor GPUs.
"""

from __future__ import annotations

import os
from pathlib import Path

from cached.client.errors import CachedError
from cached.client.handoff import File


class Files:
    """A model's files by their number. Without descriptors (sha256 -> fd), those below ``directory``."""

    def __init__(self, files: tuple[File, ...], directory: Path, fds: dict[str, int] | None = None) -> None:
        """Takes over ``fds``, which are closed by ``close``, or with the last one who uses this object."""
        self.files = files
        self._directory = directory
        self._fds = fds

    def __del__(self) -> None:
        self.close()

    def open(self, number: int) -> int:
        """A descriptor of the file, of its own, for reading. Raises CachedError."""
        file = self.files[number]
        if self._fds is not None:
            return os.dup(self._fds[file.sha256])
        path = self._directory / file.path
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise not_visible(f"{path} cannot be opened: {error.strerror}") from error

    def drop(self, number: int) -> None:
        """Close what was received for the file and all of its content: it is mapped, and needed no more."""
        fd = self._fds.pop(self.files[number].sha256, None) if self._fds is not None else None
        if fd is not None:
            os.close(fd)

    def close(self) -> None:
        """Close all that was received."""
        while self._fds:
            os.close(self._fds.popitem()[1])


def not_visible(message: str) -> CachedError:
    """An error for a path that the daemon has and this process has not."""
    hint = "mount the data directory read-only at the path that the daemon has it at, or set CACHED_DATA_DIR"
    return CachedError("FAILED_PRECONDITION", "PATH_NOT_VISIBLE", message, hint)
