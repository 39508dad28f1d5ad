"""How far an acquire is, as ``on_progress`` is told. Owns that record and its words; imports nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """``phase`` is resolving, queued, fetching, loading or waiting; ``message`` says why it waits.

    ``total_bytes`` is 0 while unknown; ``eta_s`` is None while unknown.
    """

    phase: str
    done_bytes: int = 0
    total_bytes: int = 0
    rate_bytes_per_s: float = 0.0
    eta_s: float | None = None
    message: str = ""

    def words(self) -> str:
        """One line for people: ``fetching, 12 of 90 MB (13 %)``."""
        text = self.phase
        if self.total_bytes:
            done, total = self.done_bytes / 1e6, self.total_bytes / 1e6
            text += f", {done:.0f} of {total:.0f} MB ({100 * self.done_bytes // self.total_bytes} %)"
        return f"{text}: {self.message}" if self.message else text
