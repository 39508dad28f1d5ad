"""What an origin says of a content besides its sha256, to be checked while it is hashed.

Owns the kinds: ``git`` (a git blob id) and the CRCs that object stores keep. Pure. A CRC finds what broke on
the way; it vouches for nothing, as anybody can make a content that fits it.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from typing import Protocol

from cached.model import FileSpec


class Checksum(Protocol):
    """What hashlib's objects can do."""

    def update(self, data: memoryview, /) -> None: ...

    def copy(self) -> Checksum: ...

    def hexdigest(self) -> str: ...


def begin(spec: FileSpec) -> Checksum | None:
    """The beginning of what ``spec.checksum`` is the end of; None where nothing is said."""
    if not spec.checksum:
        return None
    kind = spec.checksum.partition(":")[0]
    match kind:
        case "git":
            return hashlib.sha1(b"blob %d\0" % spec.size_bytes, usedforsecurity=False)
        case "crc32":
            return _Crc(zlib.crc32, 8)
        case "crc32c" | "crc64nvme":
            # Imported late, as few need it.
            from awscrt import checksums

            return _Crc(checksums.crc32c, 8) if kind == "crc32c" else _Crc(checksums.crc64nvme, 16)
    raise AssertionError(f"no source makes a checksum {kind!r}")


class _Crc:
    __slots__ = ("_digits", "_step", "_value")

    def __init__(self, step: Callable[[memoryview, int], int], digits: int, value: int = 0) -> None:
        self._step = step
        self._digits = digits
        self._value = value

    def update(self, data: memoryview, /) -> None:
        self._value = self._step(data, self._value)

    def copy(self) -> _Crc:
        return _Crc(self._step, self._digits, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:0{self._digits}x}"
