"""One GPU's filler: allocates memory, fills it, proves it, and hands what is sealed to the keeper.

Owns the work of one job at a time, as the keeper gives it over a socket (``wire`` has the messages), and what
of it is not sealed yet: that goes with this process. Keeps nothing and decides nothing.

Started as ``python -m preloader.filler`` with ``CUDA_VISIBLE_DEVICES`` naming its device, and a descriptor of
the socket. Killing it cancels a job; the socket's end is its own; without a job it ends after ``--idle-s``.
"""

from __future__ import annotations

import argparse
import os
import queue
import resource
import select
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from cached.blocks import BLOCK_BYTES
from cached.cuda import CudaError, Driver
from cached.fds import FramingError
from cached.model import ArtifactId, CachedError, Digest, ErrorKind, permanent, temporary
from preloader import wire
from preloader.artifact import Content, open_blob, read_tensors
from preloader.layout import bad_layout
from preloader.memory.cuda import CudaMemory, CudaPiece, is_out_of_memory, no_room, refusal, survives
from preloader.proving import Chunk, Work, threads_up_to
from preloader.view import open_view

SEND_TIMEOUT_S = 30.0
MIN_THREADS, MAX_THREADS = 4, 8
"""A few wait for the disk on the smallest machine; and a thread copies and hashes some 5 GB/s from the page
cache, where a GPU's bus takes 25 to 55."""


@dataclass(frozen=True, slots=True)
class _Proof:
    """One chunk of what was filled before, to be read back from the device."""

    piece: CudaPiece
    sha256: Digest
    chunk: int
    expected: tuple[str, ...]
    size_bytes: int

    def run(self) -> None:
        for (segment, found), wanted in zip(self.piece.read_back(self.chunk), self.expected, strict=True):
            if found != wanted:
                raise permanent(
                    ErrorKind.DATA_LOSS,
                    "GPU_MEMORY_CHANGED",
                    f"blob {self.sha256}: {segment.name} has xxh3_128 {found} on the device "
                    f"where {wanted} was copied there",
                    "whoever was given this memory wrote to it; it is loaded anew",
                )


class Filler:
    """The jobs of one device, answered over ``sock``."""

    def __init__(self, device: str, data_dir: Path, sock: socket.socket, block_bytes: int) -> None:
        self._device = device
        self._data_dir = data_dir
        self._sock = sock
        self._block_bytes = block_bytes
        self._memory: CudaMemory | None = None

    def run(self, idle_s: float) -> bool:
        """Answer until nothing was asked for that long; False where the driver cannot be used any more.

        Raises OSError or FramingError once the keeper is gone.
        """
        asked = select.poll()  # which, unlike select, takes any descriptor
        asked.register(self._sock, select.POLLIN)
        while asked.poll(idle_s * 1000):
            message, fds = wire.receive(self._sock)
            if not self._answer(message, fds):
                return False
        return True

    def _answer(self, message: dict[str, Any], fds: list[int]) -> bool:
        """Do one job, and say how it went. False where the driver cannot be used any more."""
        try:
            match message["do"]:
                case "load":
                    done = self._load(ArtifactId(message["id"]), frozenset(message["have"]))
                case "prove":
                    done = self._prove([wire.parse_layout(blob) for blob in message["layout"]["blobs"]], fds)
                case what:
                    raise FramingError(f"{what!r} is no job")
        except CachedError as error:
            wire.send(self._sock, {"error": wire.problem_to_json(error.problem)})
            return True
        except CudaError as error:
            wire.send(self._sock, {"error": wire.problem_to_json(refusal(error).problem)})
            return survives(error)
        wire.send(self._sock, {"done": True, **done})
        return True

    # --- the jobs ------------------------------------------------------------------------------

    def _load(self, artifact: ArtifactId, have: frozenset[str]) -> dict[str, Any]:
        memory = self._opened()
        with open_view(self._data_dir) as view:
            contents = read_tensors(view, artifact)
            if not contents:
                raise _no_tensors(artifact)
            pieces = _held(memory, view, [c for c in contents if c.blob.sha256 not in have])
        if pieces:  # else there is no need of a context
            try:
                with memory.at_work(piece for _, piece in pieces):
                    self._fill(memory, pieces)
            finally:
                _close(pieces)
        order = [content.blob.sha256 for content in contents]
        return {"granularity": memory.granularity_bytes, "blobs": order}

    def _fill(self, memory: CudaMemory, pieces: list[tuple[Content, CudaPiece]]) -> None:
        left = {content.blob.sha256: len(content.blob.chunks) for content, _ in pieces}
        piece_of = {content.blob.sha256: piece for content, piece in pieces}
        total = sum(content.blob.size_bytes for content, _ in pieces)
        filled: queue.SimpleQueue[CudaPiece] = queue.SimpleQueue()

        def on_done(chunk: Chunk) -> None:
            left[chunk.blob.sha256] -= 1
            if not left[chunk.blob.sha256]:
                filled.put(piece_of[chunk.blob.sha256])

        def look() -> None:
            self._seal(filled)
            self._tell(work.done_bytes, total)

        work = Work(_chunks(pieces), lane=memory.lane, on_done=on_done, threads=_threads(sum(left.values())))
        work.run(look)
        look()

    def _seal(self, filled: queue.SimpleQueue[CudaPiece]) -> None:
        """Hand over what is filled and proven, once all of it has arrived on the device."""
        while not filled.empty():
            piece = filled.get()
            piece.keep()
            wire.send(self._sock, {"sealed": piece.layout.to_json()}, piece.fds)
            piece.close()

    def _prove(self, layouts: list[wire.BlobLayout], fds: list[int]) -> dict[str, Any]:
        pieces: list[CudaPiece] = []
        try:
            memory = self._opened()
            for layout in layouts:
                blocks, fds = fds[: len(layout.blocks)], fds[len(layout.blocks) :]
                pieces.append(memory.adopt(layout, blocks))
            chunks = sum(len(piece.chunks) for piece in pieces)
            work = Work(_proofs(layouts, pieces), lane=memory.lane, threads=_threads(chunks))
            total = sum(size for layout in layouts for _, _, size in layout.tensors)
            with memory.at_work(pieces):
                work.run(lambda: self._tell(work.done_bytes, total))
        finally:
            for piece in pieces:
                piece.close()
            for fd in fds:
                os.close(fd)
        return {}

    def _tell(self, done_bytes: int, total_bytes: int) -> None:
        wire.send(self._sock, {"progress": [done_bytes, total_bytes]})

    def _opened(self) -> CudaMemory:
        """The device, asked for with the first job: so what is wrong with it is that job's answer."""
        if self._memory is None:
            gpus = Driver().gpus()
            # CUDA_VISIBLE_DEVICES leaves one; that it is the right one is worth a look.
            mine = [gpu for gpu in gpus if self._device.endswith(f"-{gpu.uuid}")]
            if not mine:
                raise _vanished(self._device, len(gpus))
            self._memory = CudaMemory(mine[0], self._block_bytes)
        return self._memory


def _held(memory: CudaMemory, view: int, contents: list[Content]) -> list[tuple[Content, CudaPiece]]:
    """Memory for all of them, or none."""
    pieces: list[tuple[Content, CudaPiece]] = []
    try:
        for content in contents:
            source = open_blob(view, content.blob, content.name)
            pieces.append((content, memory.hold(content.blob, content.tensors, source)))
    except BaseException as error:
        _close(pieces)
        if isinstance(error, CudaError) and is_out_of_memory(error):
            needed_bytes = sum(memory.image_bytes(content.tensors) for content in contents)
            raise no_room(needed_bytes, memory.gpu) from error
        raise
    return pieces


def _close(pieces: list[tuple[Content, CudaPiece]]) -> None:
    for _, piece in pieces:
        piece.close()


def _threads(chunks: int) -> int:
    """None that would have nothing to do: each pins memory."""
    return max(1, min(chunks, max(MIN_THREADS, threads_up_to(MAX_THREADS))))


def _chunks(pieces: list[tuple[Content, CudaPiece]]) -> Iterator[Chunk]:
    return (
        Chunk(piece, content.blob, content.name, index)
        for content, piece in pieces
        for index in range(len(content.blob.chunks))
    )


def _proofs(layouts: list[wire.BlobLayout], pieces: list[CudaPiece]) -> Iterator[_Proof]:
    for layout, piece in zip(layouts, pieces, strict=True):
        digests = iter(layout.digests)
        for chunk in piece.chunks:
            sizes = [segment.size_bytes for segment in piece.segments(chunk)]
            expected = tuple(islice(digests, len(sizes)))
            if len(expected) < len(sizes):
                raise bad_layout(f"it lacks digests of blob {layout.sha256}")
            yield _Proof(piece, layout.sha256, chunk, expected, sum(sizes))


def _no_tensors(artifact: ArtifactId) -> CachedError:
    return permanent(
        ErrorKind.PRECONDITION,
        "NO_TENSORS",
        f"{artifact} has no file with tensors, so there is nothing of it to have on a GPU",
        "pin it to host; only safetensors files are put on GPUs",
    )


def _vanished(device: str, count: int) -> CachedError:
    hint = "look at nvidia-smi -L; the device may have fallen off the bus, or its instance been destroyed"
    message = f"{device} is not among the {count} devices that the driver shows"
    return temporary("GPU_UNFIT", message, hint, retry_after_s=30.0)


# --- the process ---------------------------------------------------------------------------------


def main() -> None:
    options = _arguments()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # each block is an open file
    with socket.socket(fileno=options.socket_fd) as sock:
        sock.settimeout(SEND_TIMEOUT_S)
        filler = Filler(options.device, options.data_dir, sock, options.block_bytes)
        try:
            usable = filler.run(options.idle_s)
        except (OSError, FramingError):  # the keeper is gone
            usable = True
    os._exit(0 if usable else 1)  # with a driver that is lost, an orderly end may never come


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="preloader.filler", description=__doc__)
    parser.add_argument("--device", required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--socket-fd", type=int, required=True)
    parser.add_argument("--idle-s", type=float, default=5.0)
    parser.add_argument("--block-bytes", type=int, default=BLOCK_BYTES, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
