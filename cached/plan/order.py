"""Which unclaimed artifact leaves the disk first: the score, and an index that finds it without a walk; and
how warm a resident is on its device.

Owns the order of eviction. Coldest first is the rule; among those that are about as cold, what frees more
for each second that it takes to have it again goes before the rest:

    score = seconds since the last use * bytes freed / (FETCH_LATENCY_S + bytes freed / rate)

``rate`` is what its last fetch took from its origin, USUAL_RATE where nobody measured. Of models that are
large and come equally fast, the score is their idle time; small ones and those of slow origins stay
longer. Bytes that others share are not freed and do not count.

A device has an order of its own, by ``heat``: what was granted from there, each grant worth half after
HALF_LIFE_S. Pure.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Container, Iterator

from cached.model import Artifact, ArtifactId

FETCH_LATENCY_S = 1.0
USUAL_RATE = 100e6
SLOWEST_RATE = 1e6
"""Bounds what an origin that crept once can make of a model."""
HALF_LIFE_S = 3600.0
COLDEST = 4
"""Looked at in each class: that many may turn out to be shared with others before a colder class loses."""


def worth(freed_bytes: int, rate_bytes_per_s: float) -> float:
    """Bytes that leaving frees for each second that it takes to have them again."""
    rate = max(SLOWEST_RATE, rate_bytes_per_s) if rate_bytes_per_s > 0 else USUAL_RATE
    return freed_bytes / (FETCH_LATENCY_S + freed_bytes / rate)


def heat(hits: float, last_used_at: float, now: float) -> float:
    """What ``hits``, counted up to ``last_used_at``, are worth now."""
    return hits * math.exp2(-max(0.0, now - last_used_at) / HALF_LIFE_S)


class Idle:
    """Unclaimed proven artifacts by class (what they are worth, in powers of two), the coldest first in each.

    Within a class the coldest has about the highest score, so the few coldest of each class are all that
    has to be looked at.
    """

    __slots__ = ("_classes", "_where")

    def __init__(self) -> None:
        self._classes: dict[int, list[tuple[float, ArtifactId]]] = {}
        self._where: dict[ArtifactId, tuple[int, float]] = {}

    def put(self, artifact: Artifact, rate_bytes_per_s: float) -> None:
        """File it, or file it anew."""
        self.remove(artifact.id)
        number = math.frexp(worth(artifact.size_bytes, rate_bytes_per_s))[1]
        insort(self._classes.setdefault(number, []), (artifact.last_used_at, artifact.id))
        self._where[artifact.id] = number, artifact.last_used_at

    def remove(self, artifact: ArtifactId) -> None:
        """One that is not here is fine."""
        where = self._where.pop(artifact, None)
        if where is not None:
            number, last_used_at = where
            line = self._classes[number]
            del line[bisect_left(line, (last_used_at, artifact))]
            if not line:
                del self._classes[number]

    def coldest(self, but: Container[ArtifactId] = ()) -> Iterator[ArtifactId]:
        """The few coldest of each class."""
        for line in self._classes.values():
            left = COLDEST
            for _, artifact in line:
                if artifact not in but:
                    yield artifact
                    left -= 1
                if not left:
                    break

    def __iter__(self) -> Iterator[ArtifactId]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)
