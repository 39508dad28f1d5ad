"""One suite that every kind of memory passes, and what only locked host memory can show.

"cuda-fake" is GPU memory on the fake driver; "cuda" is the same on this machine's GPU, where it has one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import gpukit
import pytest
from fillerkit import real_gpu, tensors_of, tensors_on
from residentkit import (
    MIB,
    PAGE_BYTES,
    blob_of,
    charged_elsewhere,
    content,
    drops_pages,
    locked_bytes,
    may_lock,
    resident_share,
    rounded,
)

from cached.cuda import Driver, Gpu
from cached.model import CHUNK_BYTES, Blob, CachedError, Digest
from preloader.groups import HEADROOM_BYTES, Groups, own_groups
from preloader.memory import Piece
from preloader.memory.cuda import BUFFERS, CudaMemory, CudaPiece
from preloader.memory.host import HostMemory

SIZE = CHUNK_BYTES + 3 * MIB + 5
FEW_BYTES = 3 * PAGE_BYTES - 5  # what everybody may lock


def locking(groups: Groups, **more: object) -> HostMemory:
    return HostMemory(groups, None, **more)  # type: ignore[arg-type]


def unlocked(groups: Groups, **more: object) -> HostMemory:
    return HostMemory(groups, 0, "not allowed here", **more)  # type: ignore[arg-type]


host_kinds = pytest.mark.parametrize(
    "kind", [pytest.param(locking, id="host-locked"), pytest.param(unlocked, id="host-unlocked")]
)


class Kind(Protocol):
    """A kind of memory, as the suite needs it."""

    locks: bool

    def hold(self, blob: Blob, path: Path) -> Piece: ...

    def kept(self, data: bytes) -> bytes:
        """What of a blob's bytes this kind keeps."""

    def shown(self, piece: Piece) -> bytes:
        """What whoever receives the piece's descriptors finds there."""


class OnHost:
    def __init__(self, memory: HostMemory, locks: bool) -> None:
        self._memory = memory
        self.locks = locks

    def hold(self, blob: Blob, path: Path) -> Piece:
        self._memory.admit(blob.size_bytes)
        return self._memory.hold(blob, os.open(path, os.O_RDONLY))

    def kept(self, data: bytes) -> bytes:
        return data

    def shown(self, piece: Piece) -> bytes:
        with pytest.raises(OSError):
            os.write(piece.fds[0], b"x")
        return os.pread(piece.fds[0], 2 * SIZE, 0)


class OnGpu:
    """Everything from byte 8 on is tensors, of odd sizes and over the seams of blocks."""

    locks = True

    def __init__(self, gpu: Gpu, stack: ExitStack) -> None:
        unit = gpu.granularity_bytes()
        self._gpu = gpu
        self._memory = CudaMemory(gpu, block_bytes=2 * unit)
        self._stack = stack

    def hold(self, blob: Blob, path: Path) -> Piece:
        tensors = tensors_of(blob.size_bytes, 8, (1000, 3, 0, CHUNK_BYTES, 5))
        piece = self._memory.hold(blob, tensors, os.open(path, os.O_RDONLY))
        self._stack.enter_context(self._memory.at_work([piece]))
        self._stack.enter_context(self._memory.lane())
        return piece

    def kept(self, data: bytes) -> bytes:
        return data[8:]

    def shown(self, piece: Piece) -> bytes:
        assert isinstance(piece, CudaPiece)
        return b"".join(tensors_on(self._gpu, piece.layout, piece.fds).values())


@pytest.fixture(params=["host-locked", "host-unlocked", "cuda-fake", "cuda"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kind]:
    with ExitStack() as stack:
        match request.param:
            case "cuda-fake":
                gpus = stack.enter_context(gpukit.machine())
                gpus.add(total_bytes=128 * MIB, granularity=MIB)
                monkeypatch.setenv("FAKE_GPU_DIR", str(gpus.directory))
                yield OnGpu(Driver().gpus()[0], stack)
            case "cuda":
                yield OnGpu(real_gpu(), stack)
            case "host-locked":
                yield OnHost(locking(own_groups()), may_lock(SIZE))
            case _:
                yield OnHost(unlocked(own_groups()), False)


@pytest.fixture
def data() -> bytes:
    return content(SIZE)


@pytest.fixture
def source(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "blob"
    path.write_bytes(data)
    return path


@pytest.fixture
def pieces() -> Iterator[list[Piece]]:
    made: list[Piece] = []
    yield made
    for piece in made:
        piece.close()


def hold(memory: HostMemory, blob: Blob, path: Path, pieces: list[Piece]) -> Piece:
    memory.admit(blob.size_bytes)
    piece = memory.hold(blob, os.open(path, os.O_RDONLY))
    pieces.append(piece)
    return piece


def filled(piece: Piece, blob: Blob) -> list[str]:
    """Every chunk brought in; their digests."""
    found = []
    for offset in range(0, blob.size_bytes, CHUNK_BYTES):
        size = min(CHUNK_BYTES, blob.size_bytes - offset)
        found.append(piece.fill(offset, size))
    return found


def test_digests_are_those_of_the_bytes(kind: Kind, source: Path, data: bytes, pieces: list[Piece]) -> None:
    blob = blob_of(data)
    pieces.append(piece := kind.hold(blob, source))
    assert filled(piece, blob) == list(blob.chunks)
    piece.keep()
    assert piece.locked is kind.locks


def test_a_flipped_byte_shows(kind: Kind, source: Path, data: bytes, pieces: list[Piece]) -> None:
    blob = blob_of(data)
    with source.open("r+b") as file:
        file.seek(CHUNK_BYTES + 7)
        file.write(bytes([data[CHUNK_BYTES + 7] ^ 1]))
    pieces.append(piece := kind.hold(blob, source))
    first, second = filled(piece, blob)
    assert first == blob.chunks[0] and second != blob.chunks[1]


def test_the_descriptors_show_the_content(kind: Kind, source: Path, data: bytes, pieces: list[Piece]) -> None:
    blob = blob_of(data)
    pieces.append(piece := kind.hold(blob, source))
    filled(piece, blob)
    piece.keep()
    assert kind.shown(piece) == kind.kept(data)


@pytest.mark.parametrize("kind", ["cuda-fake", "cuda"], indirect=True)
def test_a_buffer_is_filled_anew_only_once_it_was_copied_from(
    kind: Kind, source: Path, data: bytes, pieces: list[Piece]
) -> None:
    blob = blob_of(data)
    pieces.append(piece := kind.hold(blob, source))
    for _ in range(BUFFERS):  # the second chunk goes where the first was
        filled(piece, blob)
        piece.fill(CHUNK_BYTES, SIZE - CHUNK_BYTES)
    piece.keep()
    assert kind.shown(piece) == kind.kept(data)


def test_nothing_is_a_content_too(kind: Kind, tmp_path: Path, pieces: list[Piece]) -> None:
    (tmp_path / "empty").touch()
    pieces.append(piece := kind.hold(blob_of(b""), tmp_path / "empty"))
    assert filled(piece, blob_of(b"")) == []
    piece.keep()
    piece.close()


def test_closing_twice_is_harmless(kind: Kind, source: Path, data: bytes, pieces: list[Piece]) -> None:
    piece = kind.hold(blob_of(data), source)
    fds = piece.fds
    assert fds
    piece.close()
    piece.close()
    assert piece.fds == ()
    for fd in fds:
        with pytest.raises(OSError):
            os.fstat(fd)


def test_a_file_that_became_shorter_is_an_error_not_our_end(
    kind: Kind, source: Path, data: bytes, pieces: list[Piece]
) -> None:
    blob = blob_of(data)
    pieces.append(piece := kind.hold(blob, source))
    os.truncate(source, CHUNK_BYTES)
    with pytest.raises(OSError, match="ends at byte"):
        filled(piece, blob)


# --- the host's room ----------------------------------------------------------------------------


@host_kinds
def test_admission_goes_by_the_group_and_by_what_is_held(
    kind, tmp_path: Path, source: Path, data: bytes, pieces: list[Piece]
) -> None:
    (tmp_path / "memory.max").write_text(str(2 * SIZE + HEADROOM_BYTES))
    (tmp_path / "memory.current").write_text("0")
    (tmp_path / "memory.stat").write_text("")
    memory = kind(Groups((tmp_path,), 2))
    assert memory.limit_bytes() == 2 * SIZE + HEADROOM_BYTES
    piece = hold(memory, blob_of(data), source, pieces)
    memory.admit(SIZE)
    with pytest.raises(CachedError, match="do not fit") as caught:
        memory.admit(SIZE + 1)
    assert caught.value.problem.temporary
    piece.close()
    memory.admit(SIZE + 1)
    with pytest.raises(CachedError, match="exceed"):
        memory.admit(2 * SIZE + 1)


# --- locking ------------------------------------------------------------------------------------


@pytest.fixture
def few(tmp_path: Path) -> tuple[Blob, Path]:
    """A blob that everybody may lock, and where it is."""
    path, data = tmp_path / "few", content(FEW_BYTES)
    path.write_bytes(data)
    return blob_of(data), path


def test_filled_ranges_are_locked_and_closing_unlocks(few: tuple[Blob, Path], pieces: list[Piece]) -> None:
    before = locked_bytes()
    piece = hold(locking(own_groups()), *few, pieces)
    piece.fill(0, PAGE_BYTES)
    assert locked_bytes() - before == PAGE_BYTES
    piece.fill(PAGE_BYTES, FEW_BYTES - PAGE_BYTES)
    assert locked_bytes() - before == rounded(FEW_BYTES) and piece.locked
    piece.close()
    assert locked_bytes() == before


def test_unlocked_says_so_and_locks_nothing(source: Path, data: bytes, pieces: list[Piece]) -> None:
    blob, before, memory = blob_of(data), locked_bytes(), unlocked(own_groups())
    piece = hold(memory, blob, source, pieces)
    filled(piece, blob)
    piece.keep()
    assert not piece.locked and locked_bytes() == before
    assert memory.cannot_lock_reason == "not allowed here"


def test_an_allowance_is_all_or_nothing_for_a_load(source: Path, data: bytes, pieces: list[Piece]) -> None:
    blob = blob_of(data)
    memory = HostMemory(own_groups(), SIZE - 1)
    assert memory.cannot_lock_reason == ""
    assert not hold(memory, blob, source, pieces).locked
    assert str(SIZE - 1) in memory.cannot_lock_reason and str(SIZE) in memory.cannot_lock_reason


def test_successors_are_told_of_what_is_locked(few: tuple[Blob, Path], pieces: list[Piece]) -> None:
    told: list[tuple[Digest, bool]] = []
    blob, path = few
    memory = locking(own_groups(), tell=lambda digest, vouched: told.append((digest, vouched)))
    piece = hold(memory, blob, path, pieces)
    filled(piece, blob)
    assert told == []
    piece.keep()
    piece.close()
    assert told == [(blob.sha256, True), (blob.sha256, False)]


# --- who is charged -----------------------------------------------------------------------------


@pytest.mark.parametrize("same_group", [False, True])
def test_pages_charged_elsewhere_are_refused(
    tmp_path: Path, few: tuple[Blob, Path], pieces: list[Piece], same_group: bool
) -> None:
    blob, path = few
    memory = charged_elsewhere(tmp_path / "group", same_group=same_group)
    piece = hold(memory, blob, path, pieces)
    memory.audit()
    filled(piece, blob)
    if same_group:  # who is charged is known
        memory.audit()
        return
    with pytest.raises(CachedError, match="charged to another control group") as caught:
        memory.audit()
    assert caught.value.problem.temporary
    piece.close()
    memory.audit()


@pytest.mark.parametrize(
    ("limit", "more", "kept"),
    [
        (str(256 * MIB), {}, False),
        ("max", {}, True),
        (str(256 * MIB), {"same_group": True}, True),
        (str(256 * MIB), {"vouched": "it"}, True),
    ],
    ids=["limited", "unlimited", "same-group", "vouched"],
)
def test_a_limited_group_reads_pages_on_its_own_account(
    tmp_path: Path, source: Path, data: bytes, pieces: list[Piece], limit: str, more: dict, kept: bool
) -> None:
    blob = blob_of(data)
    with source.open("rb") as file:
        os.fsync(file.fileno())
        file.read()
    more = {"vouched": [blob.sha256]} if "vouched" in more else more
    hold(charged_elsewhere(tmp_path / "group", limit, **more), blob, source, pieces)
    # Some pages may stay, or go, for reasons of the kernel's own.
    assert (resident_share(source) > 0.5) is (kept or not drops_pages(tmp_path))
