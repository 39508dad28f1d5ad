"""One file on its way: its partial blob, what of it is in place, and the proof of the whole.

Owns the journal's format (``<chunk> <xxh3_128>`` after each chunk's bytes are written, ``done <sha256>``
at the end) and the rule that resumes it: a line is a claim, proven when the bytes are read again for
the sha256. Knows no origin and no thread but its callers'.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from cached import safetensors
from cached.durable import Partial, RealFs
from cached.fetch import checksums
from cached.fetch.kernel import Writeback
from cached.model import CHUNK_BYTES, Blob, CachedError, Digest, ErrorKind, FileSpec, Tensor, permanent

MOST_PIECE_BYTES = 4 * 1024 * 1024
LEAST_PIECE_BYTES = 64 * 1024
"""What is read at once lies in between: much, as each piece costs some steps in Python, and little from a
slow origin, as nothing is counted, paced or stopped within a piece."""
FAST_PIECE_S, SLOW_PIECE_S = 0.03, 0.1
WRITE_BYTES = 4 * 1024 * 1024
"""What is written at once."""

_LINE = re.compile(r"(\d{1,9}) ([0-9a-f]{32})")


class Buffers:
    """A bounded number of reused places in memory, of one chunk each; they are made when first needed.

    Fresh memory costs more than the network. They begin at a page, as writing past the page cache needs.
    """

    def __init__(self, most: int) -> None:
        self._left = most
        self._free: list[memoryview] = []

    def take(self) -> memoryview | None:
        """None while all are in use."""
        if self._free:
            return self._free.pop()
        if not self._left:
            return None
        self._left -= 1
        fresh = mmap.mmap(-1, CHUNK_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel may have none
            fresh.madvise(mmap.MADV_HUGEPAGE)
        return memoryview(fresh)

    def give(self, buffer: memoryview) -> None:
        self._free.append(buffer)


@dataclass(frozen=True, slots=True)
class Mark:
    """Where a proof was."""

    sha256: checksums.Checksum
    checksum: checksums.Checksum | None


class Proof:
    """The sha256 of a file, and what else its origin says of it, taken from its bytes in order."""

    def __init__(self, spec: FileSpec) -> None:
        self._spec = spec
        self._sha256: checksums.Checksum = hashlib.sha256()
        self._checksum = checksums.begin(spec)

    def take(self, view: memoryview) -> None:
        """The next bytes."""
        self._sha256.update(view)
        if self._checksum is not None:
            self._checksum.update(view)

    def mark(self) -> Mark:
        return Mark(self._sha256.copy(), self._checksum.copy() if self._checksum is not None else None)

    def return_to(self, mark: Mark) -> None:
        """As if what came after the mark had not been taken."""
        self._sha256, self._checksum = mark.sha256, mark.checksum

    def finish(self) -> Digest:
        """Raises CachedError (DATA_LOSS ``DIGEST_MISMATCH``) where it is not what the origin says."""
        spec, found = self._spec, Digest(self._sha256.hexdigest())
        if spec.sha256 is not None and found != spec.sha256:
            raise permanent(
                ErrorKind.DATA_LOSS,
                "DIGEST_MISMATCH",
                f"{spec.path} ({spec.size_bytes} bytes) has the sha256 {found}, "
                f"and the origin says {spec.sha256}",
                "the origin's file, or the digest that it publishes (its SHA256SUMS, say), is wrong or "
                "unfinished: write both anew",
            )
        self._check_checksum()
        return found

    def _check_checksum(self) -> None:
        spec = self._spec
        if self._checksum is None:
            return
        found = f"{spec.checksum.partition(':')[0]}:{self._checksum.hexdigest()}"
        if found != spec.checksum:
            raise permanent(
                ErrorKind.DATA_LOSS,
                "DIGEST_MISMATCH",
                f"{spec.path} ({spec.size_bytes} bytes) has the checksum {found}, "
                f"and the origin says {spec.checksum}",
                "the origin, or a proxy before it, gives out a wrong or unfinished file: mend or go round it",
            )


@dataclass(slots=True)
class Part:
    """``recorded[i]`` is chunk i's xxh3_128 once its bytes are in place, None until then.

    ``missing`` are the chunks that nobody has in hand, in order; ``in_hand`` counts those that somebody has.
    ``proven`` counts the chunks from the start that the proof has; ``proving`` while a thread gives it the
    next one. ``held`` are chunks whose bytes are still in memory as well, for whoever proves them.
    ``sequential`` once the origin turned out to ignore ranges; ``streaming`` while one thread reads the
    whole file.
    """

    index: int
    spec: FileSpec
    partial: Partial
    writeback: Writeback
    proof: Proof
    recorded: list[str | None]
    missing: list[int] = field(default_factory=list)
    held: dict[int, memoryview] = field(default_factory=dict)
    in_hand: int = 0
    proven: int = 0
    proving: bool = False
    sequential: bool = False
    streaming: bool = False
    piece_bytes: int = LEAST_PIECE_BYTES

    @classmethod
    def resume(cls, index: int, spec: FileSpec, partial: Partial, writeback: Writeback) -> Part:
        """Start from what the journal claims to be in place."""
        recorded = _read_journal(partial.lines(), chunk_count(spec.size_bytes))
        missing = [chunk for chunk, digest in enumerate(recorded) if digest is None]
        return cls(index, spec, partial, writeback, Proof(spec), recorded, missing)

    def bounds(self, chunk: int) -> tuple[int, int]:
        start = chunk * CHUNK_BYTES
        return start, min(start + CHUNK_BYTES, self.spec.size_bytes)

    def size_of(self, chunk: int) -> int:
        start, stop = self.bounds(chunk)
        return stop - start

    @property
    def recorded_bytes(self) -> int:
        return sum(self.size_of(chunk) for chunk, digest in enumerate(self.recorded) if digest is not None)

    @property
    def is_proven(self) -> bool:
        return self.proven == len(self.recorded)

    @property
    def may_prove(self) -> bool:
        """Whether the next chunk is in place, and nobody is at it."""
        return not self.is_proven and not self.proving and self.recorded[self.proven] is not None

    def read_back(self, chunk: int, view: memoryview) -> bool:
        """Prove the next chunk by what the disk gives back, through ``view``. False, and as if nothing had
        been read, when that is not what was recorded."""
        before, digest = self.proof.mark(), xxhash.xxh3_128()
        position, stop = self.bounds(chunk)
        while position < stop:
            count = self.partial.read_into(view[: stop - position], position)
            if count == 0:
                break
            digest.update(view[:count])
            self.proof.take(view[:count])
            position += count
        if position == stop and digest.hexdigest() == self.recorded[chunk]:
            return True
        self.proof.return_to(before)
        return False

    def finish(self) -> Blob:
        """The blob. Raises CachedError (DATA_LOSS ``DIGEST_MISMATCH``) where it is not the expected one."""
        found = self.proof.finish()
        chunks = tuple(digest for digest in self.recorded if digest is not None)
        assert self.is_proven and len(chunks) == len(self.recorded)
        return Blob(found, self.spec.size_bytes, chunks)

    def piece_took(self, seconds: float) -> None:
        """Have the next pieces take neither too long nor too many steps."""
        if seconds < FAST_PIECE_S:
            self.piece_bytes = min(self.piece_bytes * 2, MOST_PIECE_BYTES)
        elif seconds > SLOW_PIECE_S:
            self.piece_bytes = max(self.piece_bytes // 2, LEAST_PIECE_BYTES)

    def may_hold(self, chunk: int) -> bool:
        """Whether the proof will get to this chunk without anybody having to take another first: who waits
        for a free buffer must never wait for somebody who waits for one too."""
        return not self.missing or self.missing[0] > chunk

    def give_back(self, chunk: int) -> list[memoryview]:
        """Chunk ``chunk`` is to be fetched (again). The answer: buffers that may not be held any more."""
        self.recorded[chunk] = None
        self.missing = sorted({*self.missing, chunk})
        return [self.held.pop(later) for later in sorted(self.held) if not self.may_hold(later)]


class Filling:
    """One chunk being filled in order, hashed and written on the way.

    One that ``proves`` is the chunk that the proof is to take next, and gives it the bytes on the way, while
    they are in the core's cache: then only a window of the buffer is used, and nothing is left to hold.
    """

    __slots__ = (
        "_before",
        "_hash",
        "_start",
        "_window_bytes",
        "_written",
        "buffer",
        "chunk",
        "part",
        "position",
    )

    def __init__(self, part: Part, chunk: int, buffer: memoryview, proves: bool = False) -> None:
        self.part = part
        self.chunk = chunk
        self.buffer = buffer
        self._before = part.proof.mark() if proves else None
        self._start, _ = part.bounds(chunk)
        self.position = self._written = self._start
        self._window_bytes = WRITE_BYTES if proves else CHUNK_BYTES
        self._hash = xxhash.xxh3_128()

    @property
    def stop(self) -> int:
        return self.part.bounds(self.chunk)[1]

    @property
    def filled_bytes(self) -> int:
        return self.position - self._start

    @property
    def proves(self) -> bool:
        return self._before is not None

    def give_up(self) -> None:
        """Its bytes are not to count: the proof is as it was before them."""
        if self._before is not None:
            self.part.proof.return_to(self._before)

    def space(self) -> memoryview:
        """Where the next bytes go: at most a piece, and at most the chunk's rest."""
        begin = self.filled_bytes % self._window_bytes
        most = min(self.part.piece_bytes, self.stop - self.position, WRITE_BYTES - begin % WRITE_BYTES)
        return self.buffer[begin : begin + most]

    def add(self, count: int) -> None:
        """``count`` bytes are in the space."""
        begin = self.filled_bytes % self._window_bytes
        piece = self.buffer[begin : begin + count]
        self._hash.update(piece)
        if self.proves:
            self.part.proof.take(piece)
        self.position += count
        if self.position == self.stop or self.position - self._written == WRITE_BYTES:
            self._write()

    def _write(self) -> None:
        begin = (self._written - self._start) % self._window_bytes
        self.part.partial.write_at(self.buffer[begin : begin + self.position - self._written], self._written)
        self._written = self.position

    @property
    def digest(self) -> str:
        assert self.position == self._written == self.stop
        return self._hash.hexdigest()


class Stream:
    """A file that is read from its start: its wanted chunks are filled, one after the other.

    The others are in place or in another thread's hand, and must not be written beside it.
    """

    __slots__ = ("_filling", "_part", "_position", "buffer", "wanted")

    def __init__(self, part: Part, wanted: set[int], buffer: memoryview) -> None:
        self._part = part
        self._position = 0
        self._filling: Filling | None = None
        self.wanted = wanted
        self.buffer = buffer

    def begin(self) -> int:
        """Begin at the start, (again) with the first chunk that is wanted still; says how many bytes of the
        attempt before are given up."""
        given_up = self._filling.filled_bytes if self._filling is not None else 0
        self._position, self._filling = 0, None
        return given_up

    def space(self) -> memoryview:
        chunk = self._position // CHUNK_BYTES
        if chunk in self.wanted:
            self._filling = self._filling or Filling(self._part, chunk, self.buffer)
            return self._filling.space()
        return self.buffer[: min(self._part.piece_bytes, self._part.bounds(chunk)[1] - self._position)]

    def add(self, count: int) -> Filling | None:
        """``count`` bytes are in the space. The answer: the chunk that they belong to, where it is wanted."""
        self._position += count
        filling = self._filling
        if filling is not None:
            filling.add(count)
            if filling.position == filling.stop:
                self.wanted.discard(filling.chunk)
                self._filling = None
        return filling


def chunk_count(size_bytes: int) -> int:
    return -(-size_bytes // CHUNK_BYTES)


def part_paths(ingest_dir: Path, index: int) -> tuple[Path, Path]:
    """The partial blob of file ``index``, and its journal."""
    return ingest_dir / f"{index}.part", ingest_dir / f"{index}.journal"


def discard(ingest_dir: Path, index: int) -> None:
    """Remove what turned out wrong, so that nobody resumes it."""
    for path in part_paths(ingest_dir, index):
        RealFs().unlink(path, missing_ok=True)


def read_tensors(
    read: Callable[[memoryview, int], int], size_bytes: int, path: str, file: int
) -> tuple[Tensor, ...]:
    """The tensor index of one file; empty unless it is named as a safetensors file.

    ``read(view, offset)`` fills as much of ``view`` as there is. Raises CachedError (DATA_LOSS).
    """
    if not path.endswith(".safetensors"):
        return ()
    prefix = bytearray(min(safetensors.PREFIX_BYTES, size_bytes))
    read(memoryview(prefix), 0)
    header = bytearray(safetensors.header_bytes(bytes(prefix), size_bytes, path))
    if read(memoryview(header), 0) != len(header):
        raise CachedError(_shrunk(path).problem)
    return safetensors.parse_header(bytes(header), size_bytes, path, file)


def _shrunk(path: str) -> CachedError:
    return permanent(
        ErrorKind.FAILED, "STORE_IO", f"{path} became shorter while it was read", "see the kernel's log"
    )


def _read_journal(lines: list[str], chunks: int) -> list[str | None]:
    recorded: list[str | None] = [None] * chunks
    for line in lines:
        found = _LINE.fullmatch(line)
        # Other lines are ends of earlier runs; a wrong one proves itself wrong when its bytes are read.
        if found is not None and int(found[1]) < chunks:
            recorded[int(found[1])] = found[2]
    return recorded
