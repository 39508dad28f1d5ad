"""One file on its way: its partial blob, what of it is in place, and the proof of the whole.

Owns the journal's format (``<chunk> <xxh3_128>`` after each chunk's bytes are written, ``done <sha256>``
at the end) and the rule that resumes it: a line is a claim, proven when the bytes are read again for
the sha256. Knows no origin and no thread but its callers'.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from cached import safetensors
from cached.durable import Partial, RealFs
from cached.fetch import checksums
from cached.model import CHUNK_BYTES, Blob, CachedError, Digest, ErrorKind, FileSpec, Tensor, permanent

_LINE = re.compile(r"(\d{1,9}) ([0-9a-f]{32})")


@dataclass(slots=True)
class Part:
    """``recorded[i]`` is chunk i's xxh3_128 once its bytes are in place, None until then.

    ``missing`` are the chunks that nobody has in hand, in order. ``sequential`` once the origin turned
    out to ignore ranges; ``streaming`` while one thread reads the whole file.
    """

    index: int
    spec: FileSpec
    partial: Partial
    recorded: list[str | None]
    missing: list[int] = field(default_factory=list)
    sequential: bool = False
    streaming: bool = False

    @classmethod
    def resume(cls, index: int, spec: FileSpec, partial: Partial) -> Part:
        """Start from what the journal claims to be in place."""
        recorded = _read_journal(partial.lines(), chunk_count(spec.size_bytes))
        missing = [chunk for chunk, digest in enumerate(recorded) if digest is None]
        return cls(index, spec, partial, recorded, missing)

    def bounds(self, chunk: int) -> tuple[int, int]:
        start = chunk * CHUNK_BYTES
        return start, min(start + CHUNK_BYTES, self.spec.size_bytes)

    def size_of(self, chunk: int) -> int:
        start, stop = self.bounds(chunk)
        return stop - start

    @property
    def recorded_bytes(self) -> int:
        return sum(self.size_of(chunk) for chunk, digest in enumerate(self.recorded) if digest is not None)

    def record(self, chunk: int, digest: str) -> None:
        """Say that a chunk's bytes are in place. A later line for the same chunk counts."""
        self.partial.record(f"{chunk} {digest}")
        self.recorded[chunk] = digest

    def give_back(self, chunk: int) -> None:
        """Chunk ``chunk`` is to be fetched (again)."""
        self.recorded[chunk] = None
        self.missing = sorted({*self.missing, chunk})


class Filling:
    """One chunk being written in order, hashed on the way."""

    __slots__ = ("_hash", "chunk", "part", "position", "stop")

    def __init__(self, part: Part, chunk: int) -> None:
        self.part = part
        self.chunk = chunk
        self.position, self.stop = part.bounds(chunk)
        self._hash = xxhash.xxh3_128()

    def add(self, view: memoryview) -> None:
        self.part.partial.write_at(view, self.position)
        self._hash.update(view)
        self.position += len(view)

    @property
    def digest(self) -> str:
        assert self.position == self.stop
        return self._hash.hexdigest()


class Proof:
    """The sha256 of a part, taken chunk after chunk from what the disk gives back."""

    def __init__(self, part: Part, view: memoryview) -> None:
        self._part = part
        self._view = view
        self._sha256 = hashlib.sha256()
        self._checksum = checksums.begin(part.spec)

    def take(self, chunk: int) -> bool:
        """Read the next chunk. False, and as if nothing had been read, when it is not what was recorded."""
        before = self._sha256.copy()
        checksum_before = self._checksum.copy() if self._checksum is not None else None
        digest = xxhash.xxh3_128()
        position, stop = self._part.bounds(chunk)
        while position < stop:
            count = self._part.partial.read_into(self._view[: stop - position], position)
            if count == 0:
                break
            digest.update(self._view[:count])
            self._sha256.update(self._view[:count])
            if self._checksum is not None:
                self._checksum.update(self._view[:count])
            position += count
        if position == stop and digest.hexdigest() == self._part.recorded[chunk]:
            return True
        self._sha256, self._checksum = before, checksum_before
        return False

    def finish(self) -> Blob:
        """The blob. Raises CachedError (DATA_LOSS ``DIGEST_MISMATCH``) where it is not the expected one."""
        part, found = self._part, Digest(self._sha256.hexdigest())
        if part.spec.sha256 is not None and found != part.spec.sha256:
            raise permanent(
                ErrorKind.DATA_LOSS,
                "DIGEST_MISMATCH",
                f"{part.spec.path} ({part.spec.size_bytes} bytes) has the sha256 {found}, "
                f"and the origin says {part.spec.sha256}",
                "the origin's file, or the digest that it publishes (its SHA256SUMS, say), is wrong or "
                "unfinished: write both anew",
            )
        self._check_checksum()
        chunks = tuple(digest for digest in part.recorded if digest is not None)
        assert len(chunks) == len(part.recorded)
        return Blob(found, part.spec.size_bytes, chunks)

    def _check_checksum(self) -> None:
        spec = self._part.spec
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
