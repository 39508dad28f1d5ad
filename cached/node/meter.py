"""How fast something goes: bytes done, and a rate smoothed over the last seconds.

Owns that arithmetic. Reads no clock: time arrives as an argument.
"""

from __future__ import annotations

from cached.model import Phase, Progress

SMOOTHING_S = 3.0


class Meter:
    """Bytes of one piece of work. ``update`` takes the bytes done in all, and the monotonic time in s."""

    __slots__ = ("_at", "_rate", "done_bytes", "phase", "total_bytes")

    def __init__(self, phase: Phase, total_bytes: int, now_s: float) -> None:
        self.phase = phase
        self.total_bytes = total_bytes
        self.done_bytes = 0
        self._rate = 0.0
        self._at = now_s

    def update(self, done_bytes: int, now_s: float) -> None:
        seconds = now_s - self._at
        if seconds <= 0:
            self.done_bytes = done_bytes
            return
        rate = max(0, done_bytes - self.done_bytes) / seconds
        weight = min(1.0, seconds / SMOOTHING_S) if self._rate else 1.0
        self._rate += weight * (rate - self._rate)
        self.done_bytes = done_bytes
        self._at = now_s

    def progress(self) -> Progress:
        return Progress(self.phase, self.done_bytes, self.total_bytes, self._rate)
