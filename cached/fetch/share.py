"""Who gets how much of the line: the rates and connections of the transfers that run now.

Owns that division and its rules. Pure: what runs, the caps and what was measured come in, a pace for each
goes out. Transfers that somebody waits for come first; what these do not use is for the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from cached.fetch.wire import Pace

TRICKLE_BYTES_PER_S = 64 * 1024
"""What a held transfer still reads where leaving its connection would mean to begin again. It keeps the
connection open, and is too little to be counted: outside of every cap."""
LEAST_BYTES_PER_S = 64 * 1024
"""Less than this is worth no connection: such a transfer is held."""
PAUSED_BYTES_PER_S = 1024 * 1024
"""What background work goes on at while the node is under all the pressure there can be: a node that is
always busy gets its prefetches too, some day."""
USES_ALL = 0.9
"""Who uses this much of its pace may want more of it."""
GROWS = 1.5
"""Who uses less is left this much more than it uses, so that it shows when it gets faster."""
WAITER_LEAST_BYTES_PER_S = 1024 * 1024.0

K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class Limit:
    """The most that some transfers may take together; None has no limit."""

    rate_bytes_per_s: int | None = None
    connections: int | None = None


@dataclass(frozen=True, slots=True)
class Caps:
    """``sources``: by what transfers call their source."""

    node: Limit = Limit()
    sources: Mapping[str, Limit] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Running:
    """One transfer. ``used_bytes_per_s`` is the most that it received in any moment of the last second,
    ``best_bytes_per_s`` the most it ever did; None while that cannot be told yet."""

    source: str
    background: bool
    most_connections: int
    pace_bytes_per_s: int | None = None
    used_bytes_per_s: float | None = None
    best_bytes_per_s: float | None = None


def divide(running: Mapping[K, Running], caps: Caps, background_share: float = 1.0) -> dict[K, Pace]:
    """A pace for each. The sums stay within the caps, but for what a held one trickles.

    Where the node has no cap on its rate, nobody knows what a waiter leaves unused: then the others are held
    for as long as it receives anything. ``background_share`` (0 to 1) is how much of its speed background
    work may have at this moment for other reasons.
    """
    waited = {key: one for key, one in running.items() if not one.background}
    others = {key: one for key, one in running.items() if one.background}
    line = _Line(running, caps)
    rates = line.rates({key: _want(one, WAITER_LEAST_BYTES_PER_S) for key, one in waited.items()})
    connections = line.connections({key: one.most_connections for key, one in waited.items()})
    if caps.node.rate_bytes_per_s is None and any(_receives(one) for one in waited.values()):
        return {key: _pace(rates.get(key, 0.0), connections.get(key, 0), one) for key, one in running.items()}
    rates |= line.rates({key: _modest(one, background_share, len(others)) for key, one in others.items()})
    most = {key: max(1, math.ceil(one.most_connections * background_share)) for key, one in others.items()}
    connections |= line.connections({key: most[key] for key in others if rates[key] >= LEAST_BYTES_PER_S})
    return {key: _pace(rates[key], connections.get(key, 0), one) for key, one in running.items()}


def _pace(rate: float, connections: int, one: Running) -> Pace:
    if one.background and (connections == 0 or rate < LEAST_BYTES_PER_S):
        return Pace(TRICKLE_BYTES_PER_S, 0, True)
    return Pace(None if math.isinf(rate) else int(rate), connections, one.background)


def _receives(one: Running) -> bool:
    """More than next to nothing, or nobody knows yet."""
    return one.used_bytes_per_s is None or one.used_bytes_per_s >= LEAST_BYTES_PER_S


def _want(one: Running, least_bytes_per_s: float) -> float:
    """What it could use, as far as that shows."""
    used, pace = one.used_bytes_per_s, one.pace_bytes_per_s
    if used is None or pace is None or used >= USES_ALL * pace:
        return math.inf
    return max(GROWS * used, least_bytes_per_s)


def _modest(one: Running, share: float, count: int) -> float:
    want, paused = _want(one, LEAST_BYTES_PER_S), PAUSED_BYTES_PER_S / count
    if share >= 1.0:
        return want
    if one.best_bytes_per_s is None:
        # Fewer connections have to do until it is known what a share of its speed would be.
        return want if share > 0.0 else paused
    return min(want, max(share * one.best_bytes_per_s, paused))


@dataclass(slots=True)
class _Cap(Generic[K]):
    """What is left of one cap, and whom it is for."""

    members: frozenset[K]
    rate_left: float
    connections_left: float


class _Line(Generic[K]):
    """The caps, while they are given out."""

    def __init__(self, running: Mapping[K, Running], caps: Caps) -> None:
        self._caps = [_cap(running, caps.node)]
        for name, limit in caps.sources.items():
            self._caps.append(_cap((key for key, one in running.items() if one.source == name), limit))

    def rates(self, wants: Mapping[K, float]) -> dict[K, float]:
        """Fair among equals: all rise together; who has enough, or reaches a cap, stays where it is."""
        got = dict.fromkeys(wants, 0.0)
        rising = set(wants)
        # Each round ends somebody's rise.
        while rising:
            step = min(wants[key] - got[key] for key in rising)
            stopped = {key for key in rising if wants[key] - got[key] <= step}
            for cap in self._caps:
                members = cap.members & rising
                if members and cap.rate_left / len(members) <= step:
                    tighter = cap.rate_left / len(members) < step
                    step = cap.rate_left / len(members)
                    stopped = set(members) if tighter else stopped | members
            got |= {key: got[key] + step for key in rising}
            if math.isinf(step):
                break
            for cap in self._caps:
                cap.rate_left = max(0.0, cap.rate_left - step * len(cap.members & rising))
            rising -= stopped
        return got

    def connections(self, wants: Mapping[K, int]) -> dict[K, int]:
        """One for each in turn, the first in line first, for as long as there are any."""
        got = dict.fromkeys(wants, 0)
        asking = [key for key in wants if wants[key] > 0]
        while asking:
            for key in tuple(asking):
                caps = [cap for cap in self._caps if key in cap.members]
                if got[key] == wants[key] or any(cap.connections_left < 1 for cap in caps):
                    asking.remove(key)
                    continue
                got[key] += 1
                for cap in caps:
                    cap.connections_left -= 1
        return got


def _cap(members: Iterable[K], limit: Limit) -> _Cap[K]:
    return _Cap(frozenset(members), _or_inf(limit.rate_bytes_per_s), _or_inf(limit.connections))


def _or_inf(number: int | None) -> float:
    return math.inf if number is None else number
