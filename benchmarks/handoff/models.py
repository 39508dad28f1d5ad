"""The models that are handed over: a real architecture's tensors, random weights, sharded like on a hub.

Owns their files, and what lies of them in the page cache. Imports nothing of the product and no torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.demo.processes import DemoError

ITEM_BYTES = 2
SHARD_BYTES = 2 * 10**9
PIECE_BYTES = 2**20
WRITERS = min(8, os.cpu_count() or 1)
MAY_STAY = 0.01
"""The share of a file that may still be in the page cache after it was given up."""
EXPERT_COLUMNS = 64

Tensor = tuple[str, tuple[int, ...]]
"""Its name and its shape; all are BF16."""

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)


@dataclass(frozen=True, slots=True)
class Shape:
    """A Qwen2, of which there are as many layers as fit."""

    hidden: int
    intermediate: int
    key_value: int
    vocabulary: int


SMALL = Shape(512, 1408, 128, 32_000)
MIDDLE = Shape(896, 4864, 128, 151_936)
LARGE = Shape(3584, 18_944, 512, 152_064)


@dataclass(frozen=True, slots=True)
class Model:
    """``folder``: where the origin has it."""

    name: str
    folder: Path
    tensors: int
    size_bytes: int

    @property
    def ref(self) -> str:
        return self.folder.as_uri()


def transformer(size_bytes: int) -> list[Tensor]:
    """The tensors of a model of about this size."""
    shape = SMALL if size_bytes < 5 * 10**8 else MIDDLE if size_bytes < 3 * 10**9 else LARGE
    tensors: list[Tensor] = [("model.embed_tokens.weight", (shape.vocabulary, shape.hidden))]
    layers = round((size_bytes - bytes_of(tensors)) / bytes_of(layer(0, shape)))
    for number in range(max(1, layers)):
        tensors += layer(number, shape)
    return [*tensors, ("model.norm.weight", (shape.hidden,))]


def layer(number: int, shape: Shape) -> list[Tensor]:
    hidden, inner, narrow = shape.hidden, shape.intermediate, shape.key_value
    parts = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.q_proj.bias": (hidden,),
        "self_attn.k_proj.weight": (narrow, hidden),
        "self_attn.k_proj.bias": (narrow,),
        "self_attn.v_proj.weight": (narrow, hidden),
        "self_attn.v_proj.bias": (narrow,),
        "self_attn.o_proj.weight": (hidden, hidden),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    return [(f"model.layers.{number}.{name}", size) for name, size in parts.items()]


def experts(count: int, size_bytes: int) -> list[Tensor]:
    """``count`` equal tensors that come to this size, named like a mixture of experts."""
    rows = max(1, size_bytes // count // ITEM_BYTES // EXPERT_COLUMNS)
    return [
        (f"model.layers.{n // 384}.mlp.experts.{n % 384 // 3}.{part}_proj.weight", (rows, EXPERT_COLUMNS))
        for n, part in ((n, ("gate", "up", "down")[n % 3]) for n in range(count))
    ]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(bytes_of_one(shape) for _, shape in tensors)


def bytes_of_one(shape: tuple[int, ...]) -> int:
    size_bytes = ITEM_BYTES
    for edge in shape:
        size_bytes *= edge
    return size_bytes


# --- its files ------------------------------------------------------------------------------


def write_model(folder: Path, tensors: Sequence[Tensor]) -> Model:
    """Safetensors shards, their index, config.json, and SHA256SUMS over all."""
    folder.mkdir(parents=True)
    shards = list(shards_of(tensors))
    names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    with ThreadPoolExecutor(WRITERS) as pool:
        sums = dict(zip(names, pool.map(write_shard, [folder / name for name in names], shards), strict=True))
    where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor, _ in shard}
    index = {"metadata": {"total_size": bytes_of(tensors)}, "weight_map": where}
    texts = {
        "model.safetensors.index.json": json.dumps(index),
        "config.json": json.dumps({"model_type": "qwen2"}),
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
        sums[name] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "SHA256SUMS").write_text("".join(f"{found}  {name}\n" for name, found in sums.items()))
    return Model(folder.name, folder, len(tensors), sum((folder / name).stat().st_size for name in names))


def shards_of(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    shard: list[Tensor] = []
    held_bytes = 0
    for tensor in tensors:
        if shard and held_bytes + bytes_of_one(tensor[1]) > SHARD_BYTES:
            yield shard
            shard, held_bytes = [], 0
        shard.append(tensor)
        held_bytes += bytes_of_one(tensor[1])
    yield shard


def write_shard(path: Path, tensors: Sequence[Tensor]) -> str:
    """Its sha256. Random once, then varied by its place: gigabytes of chance would take too long."""
    header = header_of(tensors)
    digest, piece = hashlib.sha256(header), bytearray(os.urandom(PIECE_BYTES))
    left = bytes_of(tensors)
    with path.open("wb", buffering=0) as file:
        file.write(header)
        while left:
            struct.pack_into("<Q", piece, 0, left)
            part = memoryview(piece)[: min(PIECE_BYTES, left)]
            digest.update(part)
            left -= file.write(part)
    return digest.hexdigest()


def header_of(tensors: Sequence[Tensor]) -> bytes:
    entries: dict[str, dict[str, object]] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors:
        end = offset + bytes_of_one(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


# --- the page cache -------------------------------------------------------------------------


def give_up(paths: Iterable[Path]) -> None:
    """Have nothing of these files in memory. Raises DemoError where the kernel keeps them."""
    os.sync()
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            share = cached_share(fd)
        finally:
            os.close(fd)
        if share > MAY_STAY:
            raise DemoError(f"{share:.0%} of {path} stay in memory: it is mapped, or on no disk")


def cached_share(fd: int) -> float:
    """How much of a file is in memory, from 0 to 1."""
    size_bytes = os.fstat(fd).st_size
    pages = -(-size_bytes // mmap.PAGESIZE)
    if not pages:
        return 0.0
    # Private and writable only so that ctypes may look at its address; nothing is written.
    with mmap.mmap(fd, size_bytes, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
        there = ctypes.create_string_buffer(pages)
        first = ctypes.c_char.from_buffer(mapped)
        failed = _LIBC.mincore(ctypes.addressof(first), size_bytes, there)
        del first  # or the mapping could not be closed
    if failed:
        raise OSError(ctypes.get_errno(), "mincore failed")
    return sum(page & 1 for page in there.raw) / pages


def bring_in(paths: Iterable[Path]) -> None:
    """Have all of these files in the page cache."""
    view = memoryview(bytearray(PIECE_BYTES))
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(view):
                pass
