"""The fetches of this moment: who brings which content, who waits for that, and what each is using.

Owns the rule that one content is fetched once however many want it: it is the fetch's that asks for it first,
just before it begins the file. Who comes later is told when it is there; or, when that fetch ended without
it, that it is his. A fetch that somebody's fetch depends on counts as waited for as well. Knows no process
and no disk; the clock arrives as an argument. Nothing of this outlives the daemon: what counts is on disk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from cached.fetch.wire import Have, Order, Pace, Taken, Yours
from cached.model import Blob, Digest, Revision, RevisionKey

BEGINS_S = 2.0
"""For how long a fetch that received nothing yet counts as one that is about to."""
LOOKS_BACK_S = 1.0


@dataclass(slots=True)
class Usage:
    """What one fetch receives, seen a few times a second."""

    began_s: float
    origin_bytes: int = 0
    _seen_bytes: int = 0
    _seen_s: float = 0.0
    _first_s: float | None = None
    _best_bytes_per_s: float = 0.0
    _rates: deque[tuple[float, float]] = field(default_factory=deque)

    def look(self, now_s: float) -> None:
        """Take the rate since the last look."""
        since_s = max(self._seen_s, self.began_s)
        if now_s <= since_s:
            return
        rate = (self.origin_bytes - self._seen_bytes) / (now_s - since_s)
        self._seen_bytes, self._seen_s = self.origin_bytes, now_s
        self._best_bytes_per_s = max(self._best_bytes_per_s, rate)
        if self.origin_bytes and self._first_s is None:
            self._first_s = now_s
        self._rates.append((now_s, rate))
        while self._rates[0][0] < now_s - LOOKS_BACK_S:
            self._rates.popleft()

    def most_bytes_per_s(self, now_s: float) -> float | None:
        """The highest rate of the last second; None while it has just begun."""
        if not self.origin_bytes and now_s - self.began_s < BEGINS_S:
            return None
        return max((rate for _, rate in self._rates), default=0.0)

    def best_bytes_per_s(self) -> float | None:
        """The highest rate ever; None until it has had the time to get up to speed."""
        known = self._first_s is not None and self._seen_s >= self._first_s + BEGINS_S
        return self._best_bytes_per_s if known else None


@dataclass(slots=True, eq=False)
class Flight:
    """One fetch. ``known`` are contents that others committed since it began."""

    revision: Revision
    background: bool
    wants: frozenset[Digest]
    known: dict[Digest, Blob] = field(default_factory=dict)
    pace: Pace | None = None
    usage: Usage | None = None


class Flights:
    """All of them, in order of their beginning."""

    def __init__(self) -> None:
        self._live: dict[RevisionKey, Flight] = {}
        self._owner: dict[Digest, Flight] = {}
        self._waiting: dict[Digest, list[Flight]] = {}

    def __iter__(self) -> Iterator[Flight]:
        return iter(self._live.values())

    def get(self, key: RevisionKey) -> Flight | None:
        return self._live.get(key)

    def begin(self, revision: Revision, background: bool) -> Flight:
        """To be called before anybody looks at what is on disk already: what is committed from here on is
        told, and what was before is found."""
        assert revision.key not in self._live
        wants = frozenset(spec.sha256 for spec in revision.files if spec.sha256 is not None)
        flight = self._live[revision.key] = Flight(revision, background, wants)
        return flight

    def claim(self, flight: Flight, digest: Digest) -> Order:
        """The answer to whether ``flight`` may begin with this content."""
        if digest in flight.known:
            return Have(flight.known[digest])
        if self._owner.setdefault(digest, flight) is flight:
            return Yours(digest)
        self._waiting.setdefault(digest, []).append(flight)
        return Taken(digest)

    def committed(self, flight: Flight, blob: Blob) -> list[tuple[Flight, Order]]:
        """``flight`` brought this blob, and the store has it: who is to be told."""
        digest = blob.sha256
        for other in self:
            if digest in other.wants:
                other.known[digest] = blob
        if self._owner.get(digest) is flight:
            del self._owner[digest]
        return [(other, Have(blob)) for other in self._waiting.pop(digest, [])]

    def end(self, flight: Flight) -> list[tuple[Flight, Order]]:
        """It brings nothing more: who is to fetch what it leaves, those that are waited for first."""
        del self._live[flight.revision.key]
        for digest, waiting in tuple(self._waiting.items()):
            self._waiting[digest] = [other for other in waiting if other is not flight]
        told: list[tuple[Flight, Order]] = []
        for digest in [digest for digest, owner in self._owner.items() if owner is flight]:
            del self._owner[digest]
            heir = min(self._waiting.get(digest, []), key=lambda other: other.background, default=None)
            if heir is not None:
                self._owner[digest] = heir
                self._waiting[digest].remove(heir)
                told.append((heir, Yours(digest)))
        self._waiting = {digest: waiting for digest, waiting in self._waiting.items() if waiting}
        return told

    def urgent(self) -> set[RevisionKey]:
        """Those that somebody waits for, and those that bring what one of these lacks."""
        urgent = {flight.revision.key for flight in self if not flight.background}
        for _ in range(len(self._live)):
            needed = {
                self._owner[digest].revision.key
                for digest, waiting in self._waiting.items()
                if digest in self._owner and any(other.revision.key in urgent for other in waiting)
            }
            if needed <= urgent:
                break
            urgent |= needed
        return urgent
