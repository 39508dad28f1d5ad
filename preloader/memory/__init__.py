"""Kinds of memory that artifacts can stand in: one protocol, one module per kind.

Owns what a piece of any kind does. A kind knows blobs, never artifacts; it decides nothing and logs nothing.
Every kind passes ``tests/test_preloader_memory.py``.

The life of a piece: its memory holds it (each kind knows what it needs for that), ``fill`` brings in each
chunk (from any thread) and tells what is to be proven, ``keep`` says that all of it was proven, ``close``
gives the memory back.
"""

from __future__ import annotations

from typing import Protocol


class Piece(Protocol):
    """One blob in memory."""

    @property
    def fds(self) -> tuple[int, ...]:
        """The descriptors that a handoff sends; the piece keeps them. Valid until ``close``, then none."""

    @property
    def locked(self) -> bool:
        """Whether what was proven is what stays. Can turn False while it is filled, never True again."""

    @property
    def write_protected(self) -> bool:
        """Whether nobody can write to the memory through ``fds``, root included."""

    def fill(self, offset: int, size_bytes: int) -> str:
        """Bring in a chunk, locked where possible. Returns its xxh3_128 (32 hex digits) as it came in.

        Raises OSError when the source cannot be read.
        """

    def keep(self) -> None:
        """All of it was filled and proven."""

    def close(self) -> None:
        """Give memory and descriptors back. No other call may be under way. Repeating it is harmless."""
