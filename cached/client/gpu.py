"""A model that stands on a GPU already, mapped read-only into this process and wrapped by torch.

Owns the mapping, and how long it lives: as long as the model, or any tensor or view made of it. Knows neither
the daemon nor gRPC. What is mapped belongs to every replica on the GPU: a write through it ends this
process's use of CUDA.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cached.client import handoff
from cached.client.devices import IMPORT_FAILED
from cached.client.errors import CachedError
from cached.client.handoff import Index, Place
from cached.client.tensors import shape_of
from cached.cuda import CudaError, Gpu

if TYPE_CHECKING:
    import torch


class Shared:
    """A ``tensors.Memory`` over a GPU's blocks."""

    shared = True

    def __init__(self, gpu: Gpu, index: Index, fds: tuple[int, ...]) -> None:
        """Maps and closes ``fds``: layout and blocks. Raises CachedError, IMPORT_FAILED where CUDA fails."""
        layout_fd, *block_fds = fds
        try:
            with handoff.without_gc():
                blocks, images = _layout(layout_fd, index)
            if len(blocks) != len(block_fds) or not blocks:
                raise handoff.foreign(f"{len(block_fds)} blocks came for {len(blocks)}")
            self._window = Window(gpu, sum(blocks))
            while block_fds:
                self._window.map(block_fds.pop(0), blocks.pop(0))
            self._window.seal()
        except CudaError as error:
            message = f"{index.ref} stands on the GPU and cannot be mapped there: {error}"
            raise CachedError("UNAVAILABLE", IMPORT_FAILED, message) from error
        finally:
            for fd in (layout_fd, *block_fds):
                os.close(fd)
        self._gpu = gpu
        self._pid = os.getpid()
        self._shifts = _shifts(index, images, self._window.address)

    @functools.cached_property
    def _device(self) -> torch.device:
        return torch_device(self._gpu)

    def tensor(self, place: Place, dtype: torch.dtype) -> torch.Tensor:
        import torch

        check_not_forked(self._pid)
        shape = shape_of(place)
        if not place.size_bytes:
            return torch.empty(shape, dtype=dtype, device=self._device)
        address = self._shifts[place.name] + place.offset_bytes
        return _wrap(self._window, address, place.size_bytes, dtype, shape, self._device)

    def tensors(self, places: Sequence[Place], dtypes: Sequence[torch.dtype]) -> list[torch.Tensor]:
        return [self.tensor(place, dtype) for place, dtype in zip(places, dtypes, strict=True)]

    def part(self, place: Place, dtype: torch.dtype, dim: int, start: int, stop: int) -> torch.Tensor:
        return self.tensor(place, dtype).narrow(dim, start, stop - start)


@dataclass(slots=True)
class _Held:
    """What a window has of its GPU, beside the context."""

    address: int = 0
    size_bytes: int = 0
    mapped_bytes: int = 0


class Window:
    """Addresses in which blocks are mapped one after the other; given back with the last user of this object.

    Nothing is given back at the end of the process, or in a forked child: the driver does that by itself.
    """

    def __init__(self, gpu: Gpu, size_bytes: int) -> None:
        gpu.hold()  # what is mapped is of use in a context only, and torch may not have made it yet
        self._gpu, self._held = gpu, _Held()
        weakref.finalize(self, _give_back, gpu, self._held, os.getpid()).atexit = False
        self._held.address = self.address = gpu.reserve(size_bytes)
        self._held.size_bytes = size_bytes

    def map(self, fd: int, size_bytes: int) -> None:
        """Map the whole block behind ``fd``, which is closed, after the last one."""
        try:
            handle = self._gpu.import_(fd)
        finally:
            os.close(fd)
        try:
            self._gpu.map(self.address + self._held.mapped_bytes, size_bytes, handle)
            self._held.mapped_bytes += size_bytes
        finally:
            self._gpu.release(handle)

    def seal(self) -> None:
        """All is mapped: it may be read from now on, and not written."""
        with self._gpu.context():
            self._gpu.allow(self.address, self._held.size_bytes, write=False)


def torch_device(gpu: Gpu) -> torch.device:
    """Torch's device for a GPU, with its primary context made."""
    import torch

    kind = gpu.driver.torch_device
    if kind != "cuda":
        return torch.device(kind)
    torch.cuda.init()  # type: ignore[no-untyped-call]
    return torch.empty(0, device=torch.device(kind, gpu.ordinal)).device


def check_not_forked(pid: int) -> None:
    """Raises CachedError in a child of the process ``pid``, where CUDA would fail in stranger ways."""
    if os.getpid() != pid:
        message = (
            "this process was forked from the one that acquired the model on a GPU, and CUDA survives no fork"
        )
        hint = (
            "acquire after the fork, or spawn the child: a model that is pickled to it is acquired anew there"
        )
        raise CachedError("FAILED_PRECONDITION", "FORKED", message, hint)


def _give_back(gpu: Gpu, held: _Held, pid: int) -> None:
    if os.getpid() != pid:
        return
    # A device that is gone has no memory to give back, and nobody is left who could be told.
    with contextlib.suppress(CudaError):
        if held.mapped_bytes:
            with gpu.context():
                gpu.finish()  # kernels that were started may read it still
            gpu.unmap(held.address, held.mapped_bytes)
        if held.size_bytes:
            gpu.free(held.address, held.size_bytes)
    with contextlib.suppress(CudaError):
        gpu.let_go()


def _wrap(
    window: Window,
    address: int,
    size_bytes: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    device: torch.device,
) -> torch.Tensor:
    """A tensor at an address of the window, which lives as long as the memory is in use.

    A storage has one Python object for all of its life, however few names that has: torch keeps it with the
    storage itself, and so what hangs on it. That holds for views, ``detach``, ``Parameter``, and autograd.
    """
    import torch

    if not hasattr(torch._C, "_construct_storage_from_data_pointer"):
        return torch.as_tensor(_Foreign(window, address, size_bytes), device=device).view(dtype).view(shape)
    storage = torch._C._construct_storage_from_data_pointer(address, device, size_bytes)
    setattr(storage, "cached_window", window)  # noqa: B010 - mypy knows no such attribute
    return torch.empty(0, dtype=dtype, device=device).set_(storage, 0, shape, _strides(shape))


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """In elements, of a tensor that lies together."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides[: len(shape)]))


class _Foreign:
    """Bytes as CUDA libraries show them to each other; torch keeps this object with the tensor."""

    def __init__(self, window: Window, address: int, size_bytes: int) -> None:
        self._window = window
        self.__cuda_array_interface__ = {
            "shape": (size_bytes,),
            "typestr": "|u1",
            "data": (address, False),  # torch takes nothing that says it is read-only
            "version": 3,
        }


@dataclass(frozen=True, slots=True)
class _Image:
    """A blob's tensors on the device: from which address on, and by name (offset, size) in bytes."""

    start: int
    places: dict[str, tuple[int, int]]


def _layout(fd: int, index: Index) -> tuple[list[int], dict[str, _Image]]:
    """The sizes of all blocks, and the images by sha256, whose addresses count from the first block's."""
    try:
        body = json.loads(handoff.read_all(fd))
        if body["version"] != 1 or body["id"] != index.id:
            raise ValueError(f"version {body['version']} of {body['id']}")
        blocks: list[int] = []
        images: dict[str, _Image] = {}
        for blob in body["blobs"]:
            places = {name: (int(offset), int(size)) for name, offset, size in blob["tensors"]}
            if any(offset < 0 or offset + size > sum(blob["blocks"]) for offset, size in places.values()):
                raise ValueError(f"a tensor lies outside of the image of {blob['sha256']}")
            images[blob["sha256"]] = _Image(sum(blocks), places)
            blocks += blob["blocks"]
    except (ValueError, KeyError, TypeError) as error:
        raise handoff.foreign(f"its layout is not understood: {error!r}") from error
    return blocks, images


def _shifts(index: Index, images: dict[str, _Image], address: int) -> dict[str, int]:
    """By name, what leads from a tensor's place in its file to its address: both have the same bytes."""
    shifts: dict[str, int] = {}
    for place in index.places:
        if not place.size_bytes:
            continue
        image = images.get(index.files[place.file].sha256, _NOTHING)
        offset, size_bytes = image.places.get(place.name, (0, 0))
        if size_bytes != place.size_bytes:
            what = f"{place.name!r} has {size_bytes} bytes on the GPU and {place.size_bytes} in its file"
            raise handoff.foreign(what)
        shifts[place.name] = address + image.start + offset - place.offset_bytes
    return shifts


_NOTHING = _Image(0, {})
