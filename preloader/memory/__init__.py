"""Kinds of memory that artifacts can stand in: one protocol, one module per kind.

Owns what the loader may ask of any kind. A kind knows blobs, never artifacts; it decides nothing and logs
nothing. Every kind passes ``tests/test_preloader_memory.py``.

The life of a piece: ``hold`` makes it, ``fill`` brings in each chunk (from any thread), ``digest`` proves
what then stands in memory, ``keep`` says that all of it was proven, ``close`` gives the memory back.
"""

from __future__ import annotations

from typing import Protocol

from cached.model import Blob, Device


class Piece(Protocol):
    """One blob in memory."""

    @property
    def fd(self) -> int:
        """The descriptor that a handoff sends; the piece keeps it. Valid until ``close``."""

    @property
    def locked(self) -> bool:
        """Whether what was proven is what stays. Can turn False while it is filled, never True again."""

    @property
    def write_protected(self) -> bool:
        """Whether nobody can write to the memory through ``fd``, root included."""

    def fill(self, offset: int, size_bytes: int) -> None:
        """Bring in a range, and lock it where possible. Raises OSError when the source cannot be read."""

    def digest(self, offset: int, size_bytes: int) -> str:
        """The xxh3_128 (32 hex digits) of a filled range as it stands in memory. Raises like ``fill``."""

    def keep(self) -> None:
        """All of it was filled and proven."""

    def close(self) -> None:
        """Give memory and descriptor back. No other call may be under way. Repeating it is harmless."""


class Memory(Protocol):
    """One device's memory. ``admit``, ``hold`` and ``audit`` are called by one load at a time."""

    @property
    def device(self) -> Device: ...

    @property
    def cannot_lock_reason(self) -> str:
        """Why pieces stay unlocked; empty where they are locked."""

    def limit_bytes(self) -> int:
        """The most this memory could ever hold."""

    def admit(self, new_bytes: int) -> None:
        """Refuse what does not fit beside what is held. Raises CachedError (NO_ROOM) with the arithmetic."""

    def hold(self, blob: Blob, source: int) -> Piece:
        """An empty piece for ``blob``, whose bytes are those of the file ``source``.

        Owns ``source`` from now on.
        """

    def audit(self) -> None:
        """Check, during a load and at its end, that what is held may stay. Raises CachedError (NO_ROOM)."""
