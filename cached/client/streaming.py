"""A model that is copied to a GPU, into memory of the replica's own, at the rate of the device's copies.

Owns a ring of pinned buffers, the threads that fill them from a model's files, and the copies under way.
Knows neither the daemon nor gRPC. Nothing it gives is shared, so everything may be written to.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cached.client.errors import CachedError
from cached.client.files import Files
from cached.client.gpu import check_not_forked, torch_device
from cached.client.handoff import Place
from cached.client.pages import Pages, size_changed
from cached.client.tensors import shape_of
from cached.cuda import CudaError, Gpu

if TYPE_CHECKING:
    import torch

BUFFER_BYTES = 16 * 1024 * 1024
THREADS = 4
"""Each has two buffers: one is filled while the device copies from the other."""
RUN_BYTES = 64 * 1024
"""Rows of a part that are longer are read one by one, shorter ones are gathered from mapped pages."""


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes that lie together in a file, and where they go on the device."""

    file: int
    offset_bytes: int
    size_bytes: int
    address: int


class Streamed:
    """A ``tensors.Memory`` that copies what is asked for, each time anew."""

    shared = False

    def __init__(self, gpu: Gpu, files: Files, buffer_bytes: int = BUFFER_BYTES) -> None:
        self._gpu = gpu
        self._files = files
        self._ring = Ring(gpu, buffer_bytes)
        self._pages = Pages(files)
        self._pid = os.getpid()
        self._lock = threading.Lock()

    @functools.cached_property
    def _device(self) -> torch.device:
        return torch_device(self._gpu)

    def tensor(self, place: Place, dtype: torch.dtype) -> torch.Tensor:
        return self.tensors([place], [dtype])[0]

    def tensors(self, places: Sequence[Place], dtypes: Sequence[torch.dtype]) -> list[torch.Tensor]:
        check_not_forked(self._pid)
        made = [self._empty(shape_of(p), dtype) for p, dtype in zip(places, dtypes, strict=True)]
        runs = [
            Run(p.file, p.offset_bytes, p.size_bytes, tensor.data_ptr())
            for p, tensor in zip(places, made, strict=True)
        ]
        with self._copying():
            self._stream(runs)
        return made

    def part(self, place: Place, dtype: torch.dtype, dim: int, start: int, stop: int) -> torch.Tensor:
        check_not_forked(self._pid)
        shape = shape_of(place)
        made = self._empty((*shape[:dim], stop - start, *shape[dim + 1 :]), dtype)
        if not made.numel():
            return made
        rows = math.prod(shape[:dim])
        row_bytes = place.size_bytes // rows
        skip_bytes, take_bytes = (n * row_bytes // shape[dim] for n in (start, stop - start))
        to, first = made.data_ptr(), place.offset_bytes + skip_bytes
        with self._copying():
            if take_bytes >= RUN_BYTES:
                self._stream(
                    [
                        Run(place.file, first + row * row_bytes, take_bytes, to + row * take_bytes)
                        for row in range(rows)
                    ]
                )
            else:
                self._ring.gather(self._rows(place, rows)[:, skip_bytes : skip_bytes + take_bytes], to)
        return made

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        import torch

        return torch.empty(shape, dtype=dtype, device=self._device)

    def _rows(self, place: Place, rows: int) -> torch.Tensor:
        """All of a tensor's bytes in mapped pages."""
        import torch

        raw = place._replace(dtype="U8", shape=(place.size_bytes,))
        return self._pages.tensor(raw, torch.uint8).view(rows, -1)

    @contextlib.contextmanager
    def _copying(self) -> Iterator[None]:
        """One at a time, and after the kernels that still use what torch's allocator has given out again."""
        import torch

        with self._lock:
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
            try:
                yield
            except CudaError as error:
                message = f"copying to the GPU {self._device} failed: {error}"
                raise CachedError("INTERNAL", "GPU_FAILED", message, "see dmesg and nvidia-smi") from error

    def _stream(self, runs: list[Run]) -> None:
        with _Opened(self._files) as opened:
            self._ring.stream(runs, opened.read)


class Ring:
    """Pinned buffers, made as they are needed and kept until the last user of this object is gone."""

    def __init__(self, gpu: Gpu, buffer_bytes: int) -> None:
        assert buffer_bytes >= RUN_BYTES
        gpu.hold()  # pinned memory and streams end with their context
        self._gpu = gpu
        self._buffer_bytes = buffer_bytes
        self._buffers: list[_Buffer] = []
        weakref.finalize(self, _unpin, gpu, self._buffers, os.getpid()).atexit = False

    def stream(self, runs: list[Run], read: Callable[[Run, memoryview], None]) -> None:
        """Copy all the runs; returns when they are there. Raises what ``read`` does, and CudaError."""
        batches = deque(_batches(runs, self._buffer_bytes))
        buffers = [self._buffer(number) for number in range(min(2 * THREADS, len(batches)))]
        if len(buffers) < 2:
            return self._drain(batches, buffers, read)
        with ThreadPoolExecutor(THREADS, thread_name_prefix="cached-stream") as pool:
            shares = [buffers[n::THREADS] for n in range(min(THREADS, len(buffers)))]
            for work in [pool.submit(self._drain, batches, share, read) for share in shares]:
                work.result()

    def _drain(
        self, batches: deque[list[Run]], buffers: list[_Buffer], read: Callable[[Run, memoryview], None]
    ) -> None:
        with self._gpu.context():
            try:
                for buffer in itertools.cycle(buffers):
                    self._gpu.synchronize(buffer.stream)
                    self._copy(batches.popleft(), buffer, read)
            except IndexError:
                pass  # all are taken
            finally:
                batches.clear()  # nobody goes on after an error
                for buffer in buffers:
                    self._gpu.synchronize(buffer.stream)

    def _copy(self, batch: list[Run], buffer: _Buffer, read: Callable[[Run, memoryview], None]) -> None:
        at = 0
        for run in batch:
            read(run, buffer.view[at : at + run.size_bytes])
            self._gpu.copy_in(run.address, buffer.address + at, run.size_bytes, buffer.stream)
            at += run.size_bytes

    def gather(self, rows: torch.Tensor, address: int) -> None:
        """Copy rows of bytes, each shorter than RUN_BYTES, so that they lie together on the device."""
        count, row_bytes = rows.shape
        step = self._buffer_bytes // row_bytes
        with self._gpu.context():
            for number, start in enumerate(range(0, count, step)):
                some, buffer = rows[start : start + step], self._buffer(number % 2)
                self._gpu.synchronize(buffer.stream)
                buffer.tensor()[: some.numel()].view(some.shape).copy_(some)
                to = address + start * row_bytes
                self._gpu.copy_in(to, buffer.address, some.numel(), buffer.stream)
            for buffer in self._buffers:
                self._gpu.synchronize(buffer.stream)

    def _buffer(self, number: int) -> _Buffer:
        if number == len(self._buffers):
            with self._gpu.context():
                address = self._gpu.pin(self._buffer_bytes)
                self._buffers.append(_Buffer(address, self._buffer_bytes, self._gpu.stream()))
        return self._buffers[number]


class _Buffer:
    """Pinned memory, and the stream of its copies."""

    def __init__(self, address: int, size_bytes: int, stream: Any) -> None:
        self.address = address
        self.stream = stream
        self._bytes = (ctypes.c_ubyte * size_bytes).from_address(address)
        self.view = memoryview(self._bytes).cast("B")

    def tensor(self) -> torch.Tensor:
        import torch

        return torch.frombuffer(self._bytes, dtype=torch.uint8)


class _Opened:
    """A model's files while they are read, each opened once."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._fds: dict[int, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._fds.values():
            os.close(fd)

    def read(self, run: Run, into: memoryview) -> None:
        """Raises CachedError."""
        fd, done = self._fd(run.file), 0
        while done < run.size_bytes:
            count = os.preadv(fd, [into[done:]], run.offset_bytes + done)
            if not count:
                file = self._files.files[run.file]
                raise size_changed(file.path, run.offset_bytes + done, file.size_bytes)
            done += count

    def _fd(self, number: int) -> int:
        with self._lock:
            if number not in self._fds:
                self._fds[number] = self._files.open(number)
            return self._fds[number]


def _batches(runs: list[Run], buffer_bytes: int) -> Iterator[list[Run]]:
    """Pieces in the files' order, as many at once as fit a buffer."""
    batch: list[Run] = []
    room_bytes = buffer_bytes
    for run in sorted(runs, key=lambda run: (run.file, run.offset_bytes)):
        done = 0
        while done < run.size_bytes:
            take = min(room_bytes, run.size_bytes - done)
            batch.append(Run(run.file, run.offset_bytes + done, take, run.address + done))
            done, room_bytes = done + take, room_bytes - take
            if not room_bytes:
                yield batch
                batch, room_bytes = [], buffer_bytes
    if batch:
        yield batch


def _unpin(gpu: Gpu, buffers: list[_Buffer], pid: int) -> None:
    if os.getpid() != pid:
        return
    with contextlib.suppress(CudaError), gpu.context():
        for buffer in buffers:
            gpu.end_stream(buffer.stream)
            gpu.unpin(buffer.address)
    with contextlib.suppress(CudaError):
        gpu.let_go()
