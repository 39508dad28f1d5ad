"""The safetensors header: from its bytes to a validated tensor index.

Owns the format's rules (8 bytes of length, JSON, then one gapless buffer) and refuses whatever
breaks them, before anybody maps it. Pure: bytes in, tensors out; no files, no torch.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from cached.model import CachedError, ErrorKind, Tensor, permanent

PREFIX_BYTES = 8
"""The header's length, little-endian, stands in front of it."""
MAX_HEADER_BYTES = 100_000_000
"""The format's own bound."""
MAX_TENSORS = 100_000
MAX_RANK = 64
MAX_VALUES = 20 * MAX_TENSORS
"""A header holds no more objects, lists and values between commas. A tensor of rank 4 has 12."""

DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits of one element, by the format's name."""
_STRING_OR_VALUE = re.compile(rb'"[^"]*(?:"|\Z)|[\[{,]')


def header_bytes(prefix: bytes, file_size_bytes: int, path: str = "the file") -> int:
    """How much of the file ``parse_header`` needs: the prefix and the header together.

    ``prefix`` is the file's first 8 bytes, or all of a shorter file. Raises CachedError (DATA_LOSS).
    """
    if len(prefix) < PREFIX_BYTES:
        raise _bad(
            path, f"it has {file_size_bytes} bytes, and the header's length alone takes {PREFIX_BYTES}"
        )
    size = int.from_bytes(prefix[:PREFIX_BYTES], "little")
    if size > MAX_HEADER_BYTES:
        raise _bad(path, f"its header would have {size} bytes, and {MAX_HEADER_BYTES} are the most")
    if PREFIX_BYTES + size > file_size_bytes:
        raise _bad(path, f"its header would end at byte {PREFIX_BYTES + size} of {file_size_bytes}")
    return PREFIX_BYTES + size


def parse_header(
    header: bytes, file_size_bytes: int, path: str = "the file", file: int = 0
) -> tuple[Tensor, ...]:
    """The tensors of a file, in the order of their bytes; offsets count from the start of the file.

    ``header`` is the file's beginning: ``header_bytes`` of it, or more. ``file`` goes into each
    Tensor as it is, ``path`` into errors. Raises CachedError (DATA_LOSS ``BAD_SAFETENSORS``) naming
    the tensor and both values.
    """
    start = header_bytes(header, file_size_bytes, path)
    if len(header) < start:
        raise _bad(path, f"its header has {start} bytes, and only {len(header)} could be read")
    entries = _load(header[PREFIX_BYTES:start], path)
    entries.pop("__metadata__", None)
    if len(entries) > MAX_TENSORS:
        raise _bad(path, f"it has {len(entries)} tensors, and {MAX_TENSORS} are the most")
    tensors = [_tensor(name, entry, start, path, file) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset_bytes, tensor.size_bytes))
    _check_gapless(tensors, start, file_size_bytes, path)
    return tuple(tensors)


def _load(text: bytes, path: str) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise _bad(path, f"its header starts with {text[:1]!r}, and must start with b'{{'")
    _check_bulk(text, path)
    try:
        entries = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"its header is not JSON: {error}") from error
    assert isinstance(entries, dict)
    return entries


def _check_bulk(text: bytes, path: str) -> None:
    """Refuse what would fill the memory once it is parsed: 100 MB of empty lists are 3 GB as objects."""
    if sum(map(text.count, (b"{", b"[", b","))) <= MAX_VALUES:
        return
    # Some may stand in strings. Without what is escaped, a string ends at the next quote.
    count = 0
    for found in _STRING_OR_VALUE.finditer(text.replace(b"\\\\", b"").replace(b'\\"', b"")):
        count += found[0] in b"[{,"
        if count > MAX_VALUES:
            raise _bad(path, f"its header holds more than {MAX_VALUES} values")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Of two entries with one name, readers differ in which they take: such a file has no one meaning.
    entries: dict[str, Any] = {}
    for name, value in pairs:
        if name in entries:
            raise ValueError(f"{name[:200]!r} stands in it twice")
        entries[name] = value
    return entries


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def _tensor(name: str, entry: Any, start: int, path: str, file: int) -> Tensor:
    where = f"tensor {name[:200]!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _bad(path, f"{where} does not have exactly dtype, shape and data_offsets")
    bits = DTYPE_BITS.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if bits is None:
        raise _bad(path, f"{where} has the unknown dtype {str(entry['dtype'])[:40]!r}")
    shape = _naturals(entry["shape"], f"{where}: shape", path)
    offsets = _naturals(entry["data_offsets"], f"{where}: data_offsets", path)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _bad(path, f"{where} has data_offsets {list(offsets)}, which are no start and end")
    size_bytes = offsets[1] - offsets[0]
    needed_bits = math.prod(shape) * bits
    if needed_bits != size_bytes * 8:
        raise _bad(
            path,
            f"{where} takes {size_bytes} bytes, but {entry['dtype']} of shape {list(shape)} "
            f"needs {needed_bits / 8:.15g}",
        )
    return Tensor(name, entry["dtype"], shape, file, start + offsets[0], size_bytes)


def _naturals(values: Any, where: str, path: str) -> tuple[int, ...]:
    # Larger than any file: keeps products short, and what follows free of surprises.
    bound = 1 << 63
    if not isinstance(values, list) or len(values) > MAX_RANK:
        raise _bad(path, f"{where} is not a list of at most {MAX_RANK} numbers")
    for value in values:
        if type(value) is not int or not 0 <= value < bound:
            raise _bad(path, f"{where} holds {str(value)[:40]!r}, which is no size")
    return tuple(values)


def _check_gapless(tensors: Sequence[Tensor], start: int, file_size_bytes: int, path: str) -> None:
    position = start
    for tensor in tensors:
        if tensor.offset_bytes != position:
            what = (
                "overlaps what is before it" if tensor.offset_bytes < position else "leaves a gap before it"
            )
            raise _bad(
                path,
                f"tensor {tensor.name[:200]!r} {what}: it starts at byte {tensor.offset_bytes}, "
                f"and the one before it ends at {position}",
            )
        position += tensor.size_bytes
    if position != file_size_bytes:
        last = f"tensor {tensors[-1].name[:200]!r}" if tensors else "its header"
        raise _bad(path, f"{last} ends at byte {position}, and the file at {file_size_bytes}")


def _bad(path: str, what: str) -> CachedError:
    return permanent(
        ErrorKind.DATA_LOSS,
        "BAD_SAFETENSORS",
        f"{path} is not valid safetensors: {what}",
        "the origin's file is broken: write it anew there, and its SHA256SUMS",
    )
