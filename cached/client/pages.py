"""Tensors over mapped files, without a copy.

Owns the mappings: private and copy-on-write, so that what a replica writes is its own. Knows neither the
daemon nor GPUs.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cached.client.errors import CachedError
from cached.client.files import Files
from cached.client.handoff import Place
from cached.client.tensors import shape_of

if TYPE_CHECKING:
    import torch

MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
"""No swap is set aside for pages that are not written to: a model may be larger than RAM."""
MADV_POPULATE_READ = 22
"""Linux 5.14: map the pages that are there, and read those that are not. A write to one still copies it."""
STEP_BYTES = 64 * 1024 * 1024
"""So much is populated at a time, for Python's other threads stand still meanwhile."""


class Pages:
    """A ``tensors.Memory`` over a model's files, each mapped whole at its first use."""

    shared = True

    def __init__(self, files: Files) -> None:
        self._files = files
        self._maps: dict[str, mmap.mmap | None] = {}

    def map(self, number: int) -> mmap.mmap | None:
        """The mapped file; None for an empty one. Raises CachedError."""
        file = self._files.files[number]
        if file.sha256 not in self._maps:
            fd = self._files.open(number)
            try:
                self._maps[file.sha256] = map_blob(fd, file.size_bytes, file.path)
            finally:
                os.close(fd)
        return self._maps[file.sha256]

    def prefault(self) -> None:
        """Map every page of the files that are mapped, which a kernel before 5.14 cannot: it does nothing."""
        for mapped in self._maps.values():
            with contextlib.suppress(OSError):
                for start in range(0, len(mapped or b""), STEP_BYTES):
                    assert mapped is not None
                    mapped.madvise(MADV_POPULATE_READ, start, min(STEP_BYTES, len(mapped) - start))

    def tensor(self, place: Place, dtype: torch.dtype) -> torch.Tensor:
        import torch

        shape, mapped = shape_of(place), self.map(place.file)
        if place.size_bytes == 0 or mapped is None:
            return torch.empty(shape, dtype=dtype)
        # frombuffer keeps the mmap object alive, but not its exported buffer: mmap.close() would pull the
        # memory from under the tensors, so nobody calls it; the last tensor's end unmaps.
        size = dtype.itemsize
        if place.offset_bytes % size == 0:
            count = place.size_bytes // size
            return torch.frombuffer(mapped, dtype=dtype, count=count, offset=place.offset_bytes).view(shape)
        raw = torch.frombuffer(mapped, dtype=torch.uint8, count=place.size_bytes, offset=place.offset_bytes)
        return raw.clone().view(dtype).view(shape)

    def tensors(self, places: Sequence[Place], dtypes: Sequence[torch.dtype]) -> list[torch.Tensor]:
        return [self.tensor(place, dtype) for place, dtype in zip(places, dtypes, strict=True)]

    def part(self, place: Place, dtype: torch.dtype, dim: int, start: int, stop: int) -> torch.Tensor:
        return self.tensor(place, dtype).narrow(dim, start, stop - start).contiguous()


def map_blob(fd: int, size_bytes: int, name: str) -> mmap.mmap | None:
    """Map the whole file behind ``fd`` privately; None for an empty one. ``fd`` may be closed afterwards.

    Raises CachedError where its size is not ``size_bytes``: touching pages past a file's end kills.
    """
    found = os.fstat(fd).st_size
    if found != size_bytes:
        raise size_changed(name, found, size_bytes)
    if size_bytes == 0:
        return None
    flags, access = mmap.MAP_PRIVATE | MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
    try:
        if sys.version_info >= (3, 13):
            return mmap.mmap(fd, size_bytes, flags, access, trackfd=False)
        return mmap.mmap(fd, size_bytes, flags, access)
    except OSError as error:
        message = f"{name} ({size_bytes} bytes) cannot be mapped: {error.strerror}"
        hint = "look at the limits of address space and of open files (ulimit -v, ulimit -n)"
        raise CachedError("RESOURCE_EXHAUSTED", "CANNOT_MAP", message, hint) from error


def size_changed(name: str, found_bytes: int, size_bytes: int) -> CachedError:
    """An error for a file that is not as long as it was when it was proven."""
    message = f"{name} has {found_bytes} bytes where {size_bytes} were proven"
    return CachedError("DATA_LOSS", "SIZE_CHANGED", message, "`cachectl verify` finds what was changed")
