"""Counts what stands in one place, each content once however many artifacts share it.

Owns the arithmetic of used bytes. Knows nothing of artifacts or devices; pure.
"""

from __future__ import annotations

from collections import ChainMap, Counter
from collections.abc import Iterable, MutableMapping
from typing import TypeVar

Item = tuple[str, int]
"""A content's key (its digest, or a stand-in until it has one) and its size in bytes."""
T = TypeVar("T")


class Ledger:
    """References per content; ``used_bytes`` is always the sum over distinct contents.

    What has one key and two sizes is two contents: of an origin that lies about one of them, nobody knows
    yet about which.
    """

    __slots__ = ("_contents", "_keys", "used_bytes")

    def __init__(self) -> None:
        self._contents: MutableMapping[Item, int] = {}
        self._keys: MutableMapping[str, int] = {}
        self.used_bytes = 0

    def draft(self) -> Ledger:
        """A ledger that starts as this one and can be changed without changing it."""
        copy = Ledger()
        copy._contents = ChainMap({}, self._contents)
        copy._keys = ChainMap({}, self._keys)
        copy.used_bytes = self.used_bytes
        return copy

    def add(self, items: Iterable[Item]) -> None:
        """Take one reference on each content in ``items``."""
        for item in set(items):
            if _change(self._contents, item, 1) == 1:
                self.used_bytes += item[1]
            _change(self._keys, item[0], 1)

    def remove(self, items: Iterable[Item]) -> None:
        """Give one reference on each content back."""
        for item in set(items):
            if _change(self._contents, item, -1) == 0:
                self.used_bytes -= item[1]
            _change(self._keys, item[0], -1)

    def missing_bytes(self, items: Iterable[Item]) -> int:
        """What adding ``items`` would add to ``used_bytes``."""
        return sum(item[1] for item in set(items) if not self._contents.get(item))

    def only_in(self, items: Iterable[Item]) -> tuple[str, ...]:
        """The contents of which ``items`` hold the last reference: what removing them would drop."""
        own = Counter(key for key, _ in set(items))
        return tuple(key for key, count in own.items() if self._keys.get(key) == count)

    def freed_bytes(self, items: Iterable[Item]) -> int:
        """What removing ``items`` would take from ``used_bytes``; no content twice."""
        return sum(item[1] for item in items if self._contents[item] == 1)


def _change(counts: MutableMapping[T, int], name: T, by: int) -> int:
    """Count, and say how many there are now; a draft keeps the zero that hides what it started from."""
    count = counts.get(name, 0) + by
    assert count >= 0, name
    counts[name] = count
    if count == 0 and isinstance(counts, dict):
        del counts[name]
    return count
