"""A file on its way: buffers are bounded and come back, and nobody waits for what waits for himself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import xxhash
from residentkit import drops_pages, resident_share

from cached.durable import Partial
from cached.fetch.kernel import Writeback
from cached.fetch.part import (
    LEAST_PIECE_BYTES,
    MOST_PIECE_BYTES,
    WRITE_BYTES,
    Buffers,
    Filling,
    Part,
    Stream,
)
from cached.model import CHUNK_BYTES, FileSpec

SIZE_BYTES = 2 * CHUNK_BYTES + 2 * WRITE_BYTES + 777
DATA = bytes(range(251)) * (SIZE_BYTES // 251 + 1)

MakePart = Callable[[bool], Part]


@pytest.fixture
def make_part(tmp_path: Path) -> Iterator[MakePart]:
    made: list[Part] = []

    def make(direct: bool) -> Part:
        partial = Partial.open(tmp_path / "p", tmp_path / "j", SIZE_BYTES, direct)
        part = Part.resume(0, FileSpec("w.bin", SIZE_BYTES, None), partial, Writeback(tmp_path / "p"))
        made.append(part)
        return part

    yield make
    for part in made:
        part.partial.close()
        part.writeback.close()


def fill(filling: Filling, most_bytes: int = MOST_PIECE_BYTES) -> None:
    while filling.position < filling.stop:
        space = filling.space()[:most_bytes]
        space[:] = DATA[filling.position : filling.position + len(space)]
        filling.add(len(space))


def test_no_more_buffers_are_given_than_there_are_and_they_are_given_again() -> None:
    buffers = Buffers(2)
    first, second = buffers.take(), buffers.take()
    assert first is not None and second is not None and buffers.take() is None
    assert len(first) == len(second) == CHUNK_BYTES
    buffers.give(first)
    assert buffers.take() is first


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("piece_bytes", [MOST_PIECE_BYTES, 100_003])
def test_what_is_filled_is_on_disk_whatever_the_pieces(
    make_part: MakePart, tmp_path: Path, direct: bool, piece_bytes: int
) -> None:
    part, buffers, digests = make_part(direct), Buffers(1), []
    for chunk in reversed(part.missing):
        buffer = buffers.take()
        assert buffer is not None
        filling = Filling(part, chunk, buffer)
        fill(filling, piece_bytes)
        digests.append(filling.digest)
        buffers.give(buffer)
    assert (tmp_path / "p").read_bytes() == DATA[:SIZE_BYTES]
    starts = (2 * CHUNK_BYTES, CHUNK_BYTES, 0)
    whole = DATA[:SIZE_BYTES]
    assert digests == [xxhash.xxh3_128(whole[start : start + CHUNK_BYTES]).hexdigest() for start in starts]


def test_pieces_grow_while_they_are_quick_and_shrink_when_they_are_slow(make_part: MakePart) -> None:
    part = make_part(False)
    filling = Filling(part, 0, memoryview(bytearray(CHUNK_BYTES)))
    assert len(filling.space()) == LEAST_PIECE_BYTES
    for _ in range(10):
        part.piece_took(0.001)
    assert len(filling.space()) == MOST_PIECE_BYTES
    part.piece_took(0.05)
    assert len(filling.space()) == MOST_PIECE_BYTES
    for _ in range(10):
        part.piece_took(1.0)
    assert len(filling.space()) == LEAST_PIECE_BYTES


def test_writing_past_the_cache_leaves_none_of_it(make_part: MakePart, tmp_path: Path) -> None:
    part, buffer = make_part(True), Buffers(1).take()
    assert buffer is not None
    fill(Filling(part, 0, buffer))
    assert (resident_share(tmp_path / "p") < 0.5) is drops_pages(tmp_path)


def test_only_what_the_proof_reaches_by_itself_is_held(make_part: MakePart) -> None:
    part = make_part(False)
    assert part.missing == [0, 1, 2]
    del part.missing[:2]
    assert part.may_hold(0) and part.may_hold(1) and not part.may_hold(2)
    part.held = {0: memoryview(b"a"), 1: memoryview(b"b")}
    assert [bytes(buffer) for buffer in part.give_back(0)] == [b"a", b"b"]
    assert part.missing == [0, 2] and not part.held


def test_the_proof_of_memory_and_of_disk_is_one(make_part: MakePart) -> None:
    part = make_part(False)
    for chunk in (0, 1, 2):
        buffer = memoryview(bytearray(CHUNK_BYTES))
        filling = Filling(part, chunk, buffer)
        fill(filling)
        part.recorded[chunk] = filling.digest
        part.held[chunk] = buffer
    part.proof.take(part.held[0])
    assert part.read_back(1, memoryview(bytearray(100_000)))
    part.proof.take(part.held[2][: part.size_of(2)])
    part.proven = 3
    assert part.finish().sha256 == hashlib.sha256(DATA[:SIZE_BYTES]).hexdigest()


def test_a_stream_fills_only_what_is_wanted_and_begins_again(make_part: MakePart, tmp_path: Path) -> None:
    part = make_part(False)
    stream = Stream(part, {1}, memoryview(bytearray(CHUNK_BYTES)))
    assert stream.begin() == 0
    position = 0
    while position < CHUNK_BYTES + 5:
        count = min(len(stream.space()), CHUNK_BYTES + 5 - position)
        assert (stream.add(count) is not None) == (position >= CHUNK_BYTES)
        position += count
    assert stream.begin() == 5, "the attempt before is given up"
    done, position = None, 0
    while stream.wanted:
        space = stream.space()
        space[:] = DATA[position : position + len(space)]
        done, position = stream.add(len(space)), position + len(space)
    assert done is not None and done.chunk == 1
    found = (tmp_path / "p").read_bytes()
    assert found[CHUNK_BYTES : 2 * CHUNK_BYTES] == DATA[CHUNK_BYTES : 2 * CHUNK_BYTES]
    assert found[:CHUNK_BYTES].count(0) == CHUNK_BYTES
