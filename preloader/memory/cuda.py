"""GPU memory: each blob's tensors in blocks of their own, which are handed out as descriptors.

Owns a blob's image on a device: creating and mapping its blocks, the copies there and back, and the words for
what the driver refuses. Creating needs no context; there is one only ``at_work``.

What is read from a file goes through pinned buffers, two for each thread, so that one is filled while the
other is copied from. Nothing is allocated for a chunk.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import os
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import xxhash

from cached.blocks import BLOCK_BYTES, Image, image_of
from cached.cuda import CudaError, Gpu
from cached.model import CHUNK_BYTES, Blob, CachedError, ErrorKind, Tensor, permanent, temporary
from preloader.memory.source import Source
from preloader.wire import BlobLayout

BUFFERS = 2
"""Of each thread, each for one chunk."""
SPARE_FILES = 8
"""The driver may open this many at once."""

_OUT_OF_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"
_NOT_SUPPORTED = {
    "CUDA_MISSING",
    "CUDA_ERROR_NOT_SUPPORTED",
    "CUDA_ERROR_NOT_PERMITTED",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
    "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE",
    "CUDA_ERROR_STUB_LIBRARY",
}
_NOT_READY = {"CUDA_ERROR_NOT_READY", "CUDA_ERROR_SYSTEM_NOT_READY", "CUDA_ERROR_DEVICE_UNAVAILABLE"}


@dataclass(frozen=True, slots=True)
class Span:
    """One tensor that has bytes: where it is in the file, and where in the image."""

    name: str
    file_offset: int
    image_offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Segment:
    """What one tensor has in one chunk: offsets from the chunk's beginning and from the image's."""

    name: str
    chunk_offset: int
    image_offset: int
    size_bytes: int


class Segments:
    """Spans in the order of the file, cut where chunks are."""

    def __init__(self, spans: Iterable[Span]) -> None:
        self._spans = [span for span in spans if span.size_bytes]
        self._ends = [span.file_offset + span.size_bytes for span in self._spans]

    @property
    def chunks(self) -> range:
        """The chunks with something of a tensor in them."""
        if not self._spans:
            return range(0)
        return range(self._spans[0].file_offset // CHUNK_BYTES, (self._ends[-1] - 1) // CHUNK_BYTES + 1)

    def of(self, chunk: int) -> list[Segment]:
        """What is in one chunk, in the order of the file."""
        begin, end = chunk * CHUNK_BYTES, (chunk + 1) * CHUNK_BYTES
        found = []
        for span in itertools.islice(self._spans, bisect_right(self._ends, begin), None):
            if span.file_offset >= end:
                break
            first, last = max(begin, span.file_offset), min(end, span.file_offset + span.size_bytes)
            place = span.image_offset + first - span.file_offset
            found.append(Segment(span.name, first - begin, place, last - first))
        return found


def runs(segments: Sequence[Segment]) -> Iterator[tuple[int, int, int]]:
    """(offset in the chunk, offset in the image, bytes): the fewest copies that bring all segments there."""
    start = place = size = 0
    for segment in segments:
        if (segment.chunk_offset, segment.image_offset) != (start + size, place + size):
            if size:
                yield start, place, size
            start, place, size = segment.chunk_offset, segment.image_offset, 0
        size += segment.size_bytes
    if size:
        yield start, place, size


@dataclass(frozen=True, slots=True)
class _Buffer:
    address: int
    view: memoryview
    stream: Any


class CudaMemory:
    """One device. Pieces are made and given back in one thread; they are filled in others.

    Its methods raise CudaError for what the driver refuses; ``refusal`` has the words for it.
    """

    def __init__(self, gpu: Gpu, block_bytes: int = BLOCK_BYTES) -> None:
        self.gpu = gpu
        self.granularity_bytes = gpu.granularity_bytes()
        self._block_bytes = block_bytes
        self._mine = threading.local()  # a thread's buffers, in turn
        self._lock = threading.Lock()  # guards what follows
        self._streams: list[Any] = []

    def image_bytes(self, tensors: Sequence[Tensor]) -> int:
        """What a blob with these tensors takes."""
        return self._image(tensors).size_bytes

    def hold(self, blob: Blob, tensors: Sequence[Tensor], source: int) -> CudaPiece:
        """Empty memory for a blob with these tensors, whose bytes are those of the file ``source``.

        Owns ``source`` from now on.
        """
        image = self._image(tensors)
        placed = tuple((t.name, at, t.size_bytes) for t, at in zip(tensors, image.offsets, strict=True))
        layout = BlobLayout(blob.sha256, image.blocks, tensors[0].offset_bytes, placed, ())
        piece = CudaPiece(self, layout, Source(source))
        try:
            piece.create()
        except BaseException:
            piece.close()
            raise
        return piece

    def adopt(self, layout: BlobLayout, fds: Sequence[int]) -> CudaPiece:
        """What was filled before, to be read back. Owns the descriptors of its blocks from now on."""
        piece = CudaPiece(self, layout, None, fds)
        try:
            piece.import_()
        except BaseException:
            piece.close()
            raise
        return piece

    @contextlib.contextmanager
    def at_work(self, pieces: Iterable[CudaPiece]) -> Iterator[None]:
        """A context, and every piece mapped: within this, lanes can be had and pieces kept."""
        with self.gpu.context():
            for piece in pieces:
                piece.map()
            yield

    @contextlib.contextmanager
    def lane(self) -> Iterator[None]:
        """What a thread needs to fill pieces or to read them back."""
        with self.gpu.context(), contextlib.ExitStack() as stack:
            buffers = [self._buffer(stack) for _ in range(BUFFERS)]
            self._mine.buffers = itertools.cycle(buffers)
            with self._lock:
                self._streams += [buffer.stream for buffer in buffers]
            try:
                yield
            finally:
                self._end(buffers)

    def buffer(self) -> _Buffer:
        """The next of this thread's buffers, once nothing is copied from it any more."""
        buffer: _Buffer = next(self._mine.buffers)
        self.gpu.synchronize(buffer.stream)
        return buffer

    def settle(self) -> None:
        """Wait for every copy that was begun. Raises what any of them met."""
        with self._lock:  # so that no lane ends its streams meanwhile
            for stream in self._streams:
                self.gpu.synchronize(stream)

    def _image(self, tensors: Sequence[Tensor]) -> Image:
        return image_of((t.size_bytes for t in tensors), self.granularity_bytes, self._block_bytes)

    def _buffer(self, stack: contextlib.ExitStack) -> _Buffer:
        address = self.gpu.pin(CHUNK_BYTES)
        stack.callback(self.gpu.unpin, address)
        stream = self.gpu.stream()
        stack.callback(self.gpu.end_stream, stream)
        view = memoryview((ctypes.c_ubyte * CHUNK_BYTES).from_address(address)).cast("B")
        return _Buffer(address, view, stream)

    def _end(self, buffers: list[_Buffer]) -> None:
        """Wait for a thread's copies; only then may others not know of its streams any more."""
        try:
            for buffer in buffers:
                self.gpu.synchronize(buffer.stream)
        finally:
            with self._lock:
                self._streams = [s for s in self._streams if all(s is not b.stream for b in buffers)]


class CudaPiece:
    """One blob's image. Made by CudaMemory; ``fds`` are its blocks."""

    locked = True
    write_protected = False

    def __init__(
        self, memory: CudaMemory, layout: BlobLayout, source: Source | None, fds: Sequence[int] = ()
    ) -> None:
        self._memory = memory
        self._gpu = memory.gpu
        self._layout = layout
        self._source = source
        self._fds = list(fds)
        self._segments = Segments(_spans(layout))
        self._digests: dict[int, list[str]] = {}
        self._handles: list[int] = []
        self._address = 0
        self._mapped_bytes = 0

    @property
    def fds(self) -> tuple[int, ...]:
        return tuple(self._fds)

    @property
    def chunks(self) -> range:
        """The chunks of the file with something of a tensor in them."""
        return self._segments.chunks

    def segments(self, chunk: int) -> list[Segment]:
        return self._segments.of(chunk)

    @property
    def layout(self) -> BlobLayout:
        """Where everything lies, with the digests of all that was filled."""
        digests = (digest for chunk in sorted(self._digests) for digest in self._digests[chunk])
        return replace(self._layout, digests=tuple(digests))

    # --- filled, from any thread with a lane -------------------------------------------------------

    def fill(self, offset: int, size_bytes: int) -> str:
        assert self._source is not None
        buffer = self._memory.buffer()
        self._source.read(buffer.view, offset, size_bytes)
        found = xxhash.xxh3_128_hexdigest(buffer.view[:size_bytes])
        segments = self._segments.of(offset // CHUNK_BYTES)
        self._digests[offset // CHUNK_BYTES] = [
            found if segment.size_bytes == size_bytes else _digest(buffer, segment) for segment in segments
        ]
        for start, place, size in runs(segments):
            self._gpu.copy_in(self._address + place, buffer.address + start, size, buffer.stream)
        return found

    def read_back(self, chunk: int) -> list[tuple[Segment, str]]:
        """What stands on the device of one chunk of the file, with the xxh3_128 of each part."""
        buffer, segments = self._memory.buffer(), self._segments.of(chunk)
        for start, place, size in runs(segments):
            self._gpu.copy_out(buffer.address + start, self._address + place, size, buffer.stream)
        self._gpu.synchronize(buffer.stream)
        return [(segment, _digest(buffer, segment)) for segment in segments]

    # --- from the thread that made it --------------------------------------------------------------

    def create(self) -> None:
        """New memory for every block."""
        with _counting_files():
            for size_bytes in self._layout.blocks:
                self._handles.append(self._gpu.create(size_bytes))
                self._fds.append(self._gpu.export(self._handles[-1]))

    def import_(self) -> None:
        """The memory behind the descriptors."""
        with _counting_files():
            for fd in self._fds:
                self._handles.append(self._gpu.import_(fd))

    def map(self) -> None:
        """At one stretch of addresses; read only what is not to be filled."""
        size_bytes = sum(self._layout.blocks)
        if not size_bytes:
            return
        self._address = self._gpu.reserve(size_bytes)
        for handle, block_bytes in zip(self._handles, self._layout.blocks, strict=True):
            self._gpu.map(self._address + self._mapped_bytes, block_bytes, handle)
            self._mapped_bytes += block_bytes
        self._release()  # what is mapped stays
        self._gpu.allow(self._address, size_bytes, write=self._source is not None)

    def keep(self) -> None:
        self._memory.settle()
        self._let_go()

    def close(self) -> None:
        # What fails here failed before, and was told; with this process's end all of it goes.
        with contextlib.suppress(CudaError):
            self._memory.settle()
        with contextlib.suppress(CudaError):
            self._let_go()
        while self._fds:
            os.close(self._fds.pop())

    def _let_go(self) -> None:
        """Everything but the memory and its descriptors."""
        if self._source is not None:
            self._source.close()
        self._release()
        if self._mapped_bytes:
            self._gpu.unmap(self._address, self._mapped_bytes)
            self._mapped_bytes = 0
        if self._address:
            self._gpu.free(self._address, sum(self._layout.blocks))
            self._address = 0

    def _release(self) -> None:
        while self._handles:
            self._gpu.release(self._handles.pop())


def _spans(layout: BlobLayout) -> Iterator[Span]:
    at = layout.begins_at
    for name, place, size_bytes in layout.tensors:
        yield Span(name, at, place, size_bytes)
        at += size_bytes


def _digest(buffer: _Buffer, segment: Segment) -> str:
    end = segment.chunk_offset + segment.size_bytes
    return xxhash.xxh3_128_hexdigest(buffer.view[segment.chunk_offset : end])


# --- what the driver refuses ---------------------------------------------------------------------


def no_room(needed_bytes: int, gpu: Gpu) -> CachedError:
    """Memory of that size was not to be had."""
    try:
        with gpu.context():
            free, total = gpu.memory()
        reports = f"the device reports {free} of {total} bytes free"
    except CudaError as error:  # there may be no room for a context either
        reports = f"how much is free the device does not tell ({error})"
    return temporary(
        "GPU_OUT_OF_MEMORY",
        f"{needed_bytes} bytes are needed on {gpu.name}, and {reports}",
        "release a model there, or end what else uses its memory",
        retry_after_s=5.0,
        kind=ErrorKind.NO_ROOM,
    )


def refusal(error: CudaError) -> CachedError:
    """The driver's error in words for an operator."""
    if is_out_of_memory(error):
        hint = "release a model there, or end what else uses its memory"
        message = f"the device has no memory left to work with ({error})"
        return temporary("GPU_OUT_OF_MEMORY", message, hint, retry_after_s=5.0, kind=ErrorKind.NO_ROOM)
    if error.name in _NOT_SUPPORTED:
        hint = (
            "this needs Linux, an NVIDIA driver of at least 525, cuda-bindings, and a GPU with virtual memory"
        )
        return permanent(ErrorKind.PRECONDITION, "GPU_NOT_SUPPORTED", str(error), hint)
    if error.name in _NOT_READY:
        hint = "wait for the driver (and, where there is one, for the fabric manager)"
        return temporary("GPU_NOT_READY", str(error), hint, retry_after_s=10.0)
    hint = "look at nvidia-smi -q and the kernel's log; the device may need a reset"
    return temporary("GPU_UNFIT", str(error), hint, retry_after_s=30.0)


def is_out_of_memory(error: CudaError) -> bool:
    return error.name == _OUT_OF_MEMORY


def survives(error: CudaError) -> bool:
    """Whether this process can still use the driver."""
    return is_out_of_memory(error) or error.name in _NOT_SUPPORTED


@contextlib.contextmanager
def _counting_files() -> Iterator[None]:
    """The driver has no word for a process that may open no more files."""
    try:
        yield
    except CudaError as error:
        if not _no_descriptors_left():
            raise
        hint = "raise the preloader's limit on open files (RLIMIT_NOFILE)"
        message = f"no descriptor is left for a block ({error})"
        raise temporary("TOO_MANY_FILES", message, hint, retry_after_s=5.0) from error


def _no_descriptors_left() -> bool:
    """Whether so few are left that the driver may lack one (it has given back what it had)."""
    spare: list[int] = []
    try:
        while len(spare) < SPARE_FILES:
            spare.append(os.memfd_create("spare"))
    except OSError as error:
        return error.errno in (errno.EMFILE, errno.ENFILE)
    finally:
        for fd in spare:
            os.close(fd)
    return False
