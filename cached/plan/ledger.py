"""Counts what stands in one place, each content once however many artifacts share it.

Owns the arithmetic of used bytes. Knows nothing of artifacts or devices; pure.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, MutableMapping

Item = tuple[str, int]
"""A content's key (its digest, or a stand-in until it has one) and its size in bytes."""


class Ledger:
    """References and bytes per content; ``used_bytes`` is always the sum over distinct contents."""

    __slots__ = ("_contents", "used_bytes")

    def __init__(self) -> None:
        self._contents: MutableMapping[str, tuple[int, int]] = {}
        self.used_bytes = 0

    def draft(self) -> Ledger:
        """A ledger that starts as this one and can be changed without changing it."""
        copy = Ledger()
        copy._contents = ChainMap({}, self._contents)
        copy.used_bytes = self.used_bytes
        return copy

    def add(self, items: Iterable[Item]) -> None:
        """Take one reference on each content in ``items``."""
        for key, size_bytes in dict(items).items():
            count, known_bytes = self._contents.get(key, (0, size_bytes))
            self._contents[key] = (count + 1, known_bytes)
            if count == 0:
                self.used_bytes += known_bytes

    def remove(self, items: Iterable[Item]) -> None:
        """Give one reference on each content back."""
        for key in dict(items):
            count, size_bytes = self._contents[key]
            assert count > 0, key
            self._contents[key] = (count - 1, size_bytes)
            if count == 1:
                self.used_bytes -= size_bytes
                if isinstance(self._contents, dict):
                    del self._contents[key]

    def missing_bytes(self, items: Iterable[Item]) -> int:
        """What adding ``items`` would add to ``used_bytes``."""
        return sum(size for key, size in dict(items).items() if not self._count(key))

    def only_in(self, items: Iterable[Item]) -> tuple[str, ...]:
        """The contents of which ``items`` hold the last reference: what removing them would drop."""
        return tuple(key for key in dict(items) if self._count(key) == 1)

    def _count(self, key: str) -> int:
        return self._contents.get(key, (0, 0))[0]
