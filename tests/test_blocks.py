"""Images: what lies where, and how much it takes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cached.blocks import ALIGN_BYTES, image_of, images
from cached.model import Digest

GRAIN, BLOCK = 1024, 8 * 1024

sizes = st.lists(st.integers(0, 3 * BLOCK), max_size=40)


@given(sizes)
def test_no_tensor_overlaps_another_or_the_end(sizes_bytes: list[int]) -> None:
    image = image_of(sizes_bytes, GRAIN, BLOCK)
    end = 0
    for offset, size_bytes in zip(image.offsets, sizes_bytes, strict=True):
        assert offset % ALIGN_BYTES == 0
        assert offset >= end or not size_bytes
        end = max(end, offset + size_bytes)
    assert end <= image.size_bytes


@given(sizes)
def test_blocks_are_cut_between_tensors_unless_one_is_larger_than_a_block(sizes_bytes: list[int]) -> None:
    image = image_of(sizes_bytes, GRAIN, BLOCK)
    seams, at = set(), 0
    for size_bytes in image.blocks:
        assert 0 < size_bytes <= BLOCK and size_bytes % GRAIN == 0
        at += size_bytes
        seams.add(at)
    for offset, size_bytes in zip(image.offsets, sizes_bytes, strict=True):
        inside = [seam for seam in seams if offset < seam < offset + size_bytes]
        assert not inside or size_bytes > BLOCK


@given(sizes)
def test_little_is_wasted(sizes_bytes: list[int]) -> None:
    image = image_of(sizes_bytes, GRAIN, BLOCK)
    waste = image.size_bytes - sum(sizes_bytes)
    assert waste < len(image.blocks) * GRAIN + len(sizes_bytes) * ALIGN_BYTES + 1


def test_contents_count_once_and_files_without_tensors_not_at_all() -> None:
    a, b = Digest("a" * 64), Digest("b" * 64)
    found = images([a, b, a], [(0, 100), (2, 100), (0, 300), (2, 300)])
    assert found == ((a, 2 * 2**20),)
