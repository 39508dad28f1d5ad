"""Where a blob's tensors lie in a device's memory: its image, as blocks that are mapped one after the other.

Owns the arithmetic of images, so that whoever counts memory and whoever fills it agree. Pure; knows no
device, opens no file.

An image is one stretch of addresses. It is made of blocks of at most ``BLOCK_BYTES``, each a multiple of the
device's granularity, cut between tensors; only a tensor that is larger than a block lies over several. No
block belongs to two blobs, so that revisions which share a blob share its blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cached.model import Digest

BLOCK_BYTES = 1024 * 1024 * 1024
ALIGN_BYTES = 256
"""Each tensor starts at a multiple of this: what kernels expect of memory that an allocator gave."""
USUAL_GRANULARITY_BYTES = 2 * 1024 * 1024
"""What memory is counted in where no device was asked yet."""


@dataclass(frozen=True, slots=True)
class Image:
    """``blocks`` are sizes in bytes; ``offsets`` has each tensor's place, from the image's start."""

    blocks: tuple[int, ...]
    offsets: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return sum(self.blocks)


def image_of(
    sizes_bytes: Iterable[int],
    granularity_bytes: int = USUAL_GRANULARITY_BYTES,
    block_bytes: int = BLOCK_BYTES,
) -> Image:
    """The image of tensors of these sizes, in this order. Blocks are a multiple of the granularity."""
    assert block_bytes % granularity_bytes == 0 and granularity_bytes % ALIGN_BYTES == 0
    blocks: list[int] = []
    offsets: list[int] = []
    base = used = 0  # of the block that is still open
    for size_bytes in sizes_bytes:
        start = _round_up(used, ALIGN_BYTES)
        if used and start + size_bytes > block_bytes:
            blocks.append(_round_up(used, granularity_bytes))
            base, start = base + blocks[-1], 0
        offsets.append(base + start)
        whole, used = divmod(start + size_bytes, block_bytes)
        blocks.extend([block_bytes] * whole)
        base += whole * block_bytes
    if used:
        blocks.append(_round_up(used, granularity_bytes))
    return Image(tuple(blocks), tuple(offsets))


def images(files: Sequence[Digest], tensors: Iterable[tuple[int, int]]) -> tuple[tuple[Digest, int], ...]:
    """Each distinct blob that has tensors, with the bytes of its image.

    ``files`` are a manifest's, ``tensors`` its tensors as (file's number, size in bytes), in its order.
    """
    sizes: dict[int, list[int]] = {}
    for file, size_bytes in tensors:
        sizes.setdefault(file, []).append(size_bytes)
    # Of files with one content, any will do.
    one_of = {files[file]: file for file in sizes if file < len(files)}
    return tuple((digest, image_of(sizes[file]).size_bytes) for digest, file in sorted(one_of.items()))


def _round_up(size_bytes: int, multiple: int) -> int:
    return -(-size_bytes // multiple) * multiple
