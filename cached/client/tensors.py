"""Tensors wrapped around mapped files, without a copy.

Owns the mappings: private and copy-on-write, so that what a replica writes is its own. Imports torch only
when the first tensor is asked for; knows neither the daemon nor gRPC.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from cached.client.errors import CachedError
from cached.client.handoff import Index, Place

if TYPE_CHECKING:
    import torch

MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
"""No swap is set aside for pages that are not written to: a model may be larger than RAM."""

DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    # Two elements in each byte, and torch counts bytes.
    "F4": "float4_e2m1fn_x2",
}
"""The safetensors names of what torch can hold, and torch's own."""


class Tensors(Mapping[str, "torch.Tensor"]):
    """A model's tensors by name, in the index's order.

    Each access wraps the mapped memory anew, in a storage of its own, and keeps the mapping alive for as
    long as the tensor lives. A tensor whose place does not fit its dtype's alignment is copied.
    """

    def __init__(self, index: Index, maps: Mapping[str, mmap.mmap | None]) -> None:
        """``maps`` has by sha256 each blob in which tensors lie. Raises CachedError for a name used twice."""
        self._places = _by_name(index)
        self._maps = [maps.get(file.sha256) for file in index.files]

    def __getitem__(self, name: str) -> torch.Tensor:
        """Raises KeyError; CachedError without torch, or for a dtype that this torch does not know."""
        place = self._places[name]
        dtype = _dtype(place)
        return _wrap(place, dtype, self._maps[place.file])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        return f"<{len(self)} tensors, {sum(p.size_bytes for p in self._places.values())} bytes>"


def map_blob(fd: int, size_bytes: int, name: str) -> mmap.mmap | None:
    """Map the whole file behind ``fd`` privately; None for an empty one. ``fd`` may be closed afterwards.

    Raises CachedError where its size is not ``size_bytes``: touching pages past a file's end kills.
    """
    found = os.fstat(fd).st_size
    if found != size_bytes:
        message = f"{name} has {found} bytes where {size_bytes} were proven"
        raise CachedError("DATA_LOSS", "SIZE_CHANGED", message, "`cachectl verify` finds what was changed")
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


def _by_name(index: Index) -> dict[str, Place]:
    places: dict[str, Place] = {}
    for place in index.places:
        other = places.setdefault(place.name, place)
        if other is not place:
            both = f"{index.files[other.file].path} and in {index.files[place.file].path}"
            message = f"tensor {place.name!r} is in {both}"
            hint = "open the wanted files below model.path with a loader of your choice"
            raise CachedError("FAILED_PRECONDITION", "DUPLICATE_TENSOR", message, hint)
    return places


def _dtype(place: Place) -> torch.dtype:
    try:
        import torch  # late: whoever only wants the path needs no torch
    except ImportError as error:
        hint = "install cached[torch], or open model.path with a loader of your choice"
        message = f"tensors need torch, and it cannot be imported: {error}"
        raise CachedError("FAILED_PRECONDITION", "NO_TORCH", message, hint) from error
    dtype = getattr(torch, DTYPES.get(place.dtype, ""), None)
    if not isinstance(dtype, torch.dtype):
        message = (
            f"tensor {place.name!r} is of dtype {place.dtype}, which torch {torch.__version__} cannot hold"
        )
        raise CachedError(
            "FAILED_PRECONDITION", "UNKNOWN_DTYPE", message, "use a newer torch, or convert the model"
        )
    return dtype


def _wrap(place: Place, dtype: torch.dtype, mapped: mmap.mmap | None) -> torch.Tensor:
    import torch

    shape = _shape(place)
    if place.size_bytes == 0 or mapped is None:
        return torch.empty(shape, dtype=dtype)
    # frombuffer keeps the mmap object alive, but not its exported buffer: mmap.close() would pull the
    # memory from under the tensors, so nobody calls it; the last tensor's end unmaps.
    if place.offset_bytes % dtype.itemsize == 0:
        count = place.size_bytes // dtype.itemsize
        return torch.frombuffer(mapped, dtype=dtype, count=count, offset=place.offset_bytes).reshape(shape)
    raw = torch.frombuffer(mapped, dtype=torch.uint8, count=place.size_bytes, offset=place.offset_bytes)
    return raw.clone().view(dtype).reshape(shape)


def _shape(place: Place) -> tuple[int, ...]:
    if place.dtype != "F4" or not place.shape:
        return place.shape
    return (*place.shape[:-1], place.shape[-1] // 2)
