"""A model's tensors by name, wherever its bytes are.

Owns the mapping from names to places, what torch makes of a place's dtype and shape, and parts of tensors.
Imports torch only when the first tensor is asked for; knows neither the daemon nor gRPC, nor what memory is.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from cached.client.errors import CachedError
from cached.client.handoff import Index, Place, without_gc

if TYPE_CHECKING:
    import torch

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


class Memory(Protocol):
    """Where tensors are made of: mapped pages, a GPU's shared memory, or copies on a GPU."""

    shared: bool
    """Whether two accesses give the same memory, so that a private tensor has to be copied."""

    def tensor(self, place: Place, dtype: torch.dtype) -> torch.Tensor:
        """The tensor at a place; ``shape_of`` is its shape."""

    def tensors(self, places: Sequence[Place], dtypes: Sequence[torch.dtype]) -> list[torch.Tensor]:
        """Many at once."""

    def part(self, place: Place, dtype: torch.dtype, dim: int, start: int, stop: int) -> torch.Tensor:
        """``start`` to ``stop`` of one dimension that is not the first."""


class Tensors(Mapping[str, "torch.Tensor"]):
    """A model's tensors by name, in the index's order.

    Each access makes the tensor anew, in a storage of its own. Over mapped pages and a GPU's shared memory
    that is a wrapper, which keeps the memory alive for as long as the tensor, or a view of it, lives; where
    the model is streamed it is a copy. A tensor in pages whose place does not fit its dtype's alignment, and
    one whose name matches a glob of ``private``, are copied, too.
    """

    def __init__(self, index: Index, memory: Memory, private: Sequence[str] = ()) -> None:
        """Raises CachedError for a name used twice."""
        self._places = _by_name(index)
        self._memory = memory
        globs = "|".join(fnmatch.translate(glob) for glob in private) if memory.shared else ""
        self._private = re.compile(globs).match if globs else None

    def __getitem__(self, name: str) -> torch.Tensor:
        """Raises KeyError; CachedError without torch, or for a dtype that this torch does not know."""
        place = self._places[name]
        return self._own(name, self._memory.tensor(place, dtype_of(place)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        return f"<{len(self)} tensors, {sum(p.size_bytes for p in self._places.values())} bytes>"

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All of them; where they are streamed, several at a time. Raises CachedError like an access."""
        places = list(self._places.values())
        with without_gc():
            made = self._memory.tensors(places, [dtype_of(place) for place in places])
            return {name: self._own(name, tensor) for name, tensor in zip(self._places, made, strict=True)}

    def slice(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """``tensor.narrow(dim, start, stop - start)``, for which no more is touched than it needs.

        In pages a view of the first dimension's part, and a copy of another's; in a GPU's shared memory a
        view; where the model is streamed, only the part is copied to the GPU. Raises IndexError besides.
        """
        place = self._places[name]
        dtype, shape = dtype_of(place), shape_of(place)
        if not (-len(shape) <= dim < len(shape)) or not 0 <= start <= stop <= shape[dim]:
            raise IndexError(f"{name} has shape {shape}: there is no {start}:{stop} of dimension {dim}")
        if dim % len(shape) == 0:
            return self._own(name, self._memory.tensor(_rows(place, shape, start, stop), dtype))
        return self._own(name, self._memory.part(place, dtype, dim % len(shape), start, stop))

    def _own(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone() if self._private is not None and self._private(name) else tensor


def dtype_of(place: Place) -> torch.dtype:
    """Raises CachedError without torch, or for a dtype that this torch does not know."""
    dtype = _torch_dtype(place.dtype)
    if dtype is None:
        import torch

        message = (
            f"tensor {place.name!r} is of dtype {place.dtype}, which torch {torch.__version__} cannot hold"
        )
        raise CachedError(
            "FAILED_PRECONDITION", "UNKNOWN_DTYPE", message, "use a newer torch, or convert the model"
        )
    return dtype


def shape_of(place: Place) -> tuple[int, ...]:
    """As torch counts elements."""
    if place.dtype != "F4" or not place.shape:
        return place.shape
    return (*place.shape[:-1], place.shape[-1] // 2)


@functools.cache
def _torch_dtype(name: str) -> torch.dtype | None:
    try:
        import torch  # late: whoever only wants the path needs no torch
    except ImportError as error:
        hint = "install cached[torch], or open model.path with a loader of your choice"
        message = f"tensors need torch, and it cannot be imported: {error}"
        raise CachedError("FAILED_PRECONDITION", "NO_TORCH", message, hint) from error
    dtype = getattr(torch, DTYPES.get(name, ""), None)
    return dtype if isinstance(dtype, torch.dtype) else None


def _by_name(index: Index) -> dict[str, Place]:
    places = {place.name: place for place in index.places}
    if len(places) == len(index.places):
        return places
    for place in index.places:
        other = places[place.name]
        if other is not place:
            both = f"{index.files[place.file].path} and in {index.files[other.file].path}"
            message = f"tensor {place.name!r} is in {both}"
            hint = "open the wanted files below model.path with a loader of your choice"
            raise CachedError("FAILED_PRECONDITION", "DUPLICATE_TENSOR", message, hint)
    return places


def _rows(place: Place, shape: tuple[int, ...], start: int, stop: int) -> Place:
    """The place of some of the first dimension, whose bytes lie together."""
    row_bytes = place.size_bytes // shape[0] if shape[0] else 0
    first = place.shape[0] // shape[0] if shape[0] else 1  # a single dimension of half bytes counts twice
    return place._replace(
        shape=((stop - start) * first, *place.shape[1:]),
        offset_bytes=place.offset_bytes + start * row_bytes,
        size_bytes=(stop - start) * row_bytes,
    )
