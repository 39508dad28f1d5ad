"""The division of the line: waiters first, fair among equals, never more than the caps."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cached.fetch.share import (
    GROWS,
    LEAST_BYTES_PER_S,
    PAUSED_BYTES_PER_S,
    TRICKLE_BYTES_PER_S,
    USES_ALL,
    Caps,
    Limit,
    Running,
    divide,
)
from cached.fetch.wire import Pace

MB = 1_000_000
WAITED = Running("", False, 4)
PREFETCH = Running("", True, 4)
HELD = Pace(TRICKLE_BYTES_PER_S, 0, True)


def line(rate: int | None, connections: int | None = None, **sources: Limit) -> Caps:
    return Caps(Limit(rate, connections), sources)


def rates(paces: dict[str, Pace]) -> dict[str, int | None]:
    return {name: pace.rate_bytes_per_s for name, pace in paces.items()}


def test_nothing_is_limited_where_nothing_has_to_be() -> None:
    assert divide({"a": PREFETCH, "b": PREFETCH}, line(None)) == {
        "a": Pace(None, 4, True),
        "b": Pace(None, 4, True),
    }


def test_equals_share_evenly() -> None:
    assert rates(divide({"a": WAITED, "b": WAITED}, line(100 * MB))) == {"a": 50 * MB, "b": 50 * MB}
    assert rates(divide({"a": PREFETCH, "b": PREFETCH}, line(100 * MB))) == {"a": 50 * MB, "b": 50 * MB}


def test_a_prefetch_gets_nothing_while_a_waiter_could_use_it() -> None:
    assert divide({"p": PREFETCH, "w": WAITED}, line(100 * MB)) == {"p": HELD, "w": Pace(100 * MB, 4, False)}
    assert divide({"p": PREFETCH, "w": WAITED}, line(None)) == {"p": HELD, "w": Pace(None, 4, False)}


def test_a_prefetch_gets_what_a_waiter_demonstrably_leaves() -> None:
    slow = replace(WAITED, pace_bytes_per_s=100 * MB, used_bytes_per_s=20.0 * MB)
    left = rates(divide({"p": PREFETCH, "w": slow}, line(100 * MB)))
    assert left == {"p": 70 * MB, "w": GROWS * 20 * MB}
    # Once it uses up what it has, it may have all again, at once.
    faster = replace(slow, pace_bytes_per_s=30 * MB, used_bytes_per_s=USES_ALL * 30 * MB)
    assert divide({"p": PREFETCH, "w": faster}, line(100 * MB)) == {"p": HELD, "w": Pace(100 * MB, 4, False)}


def test_without_a_cap_a_prefetch_is_held_until_the_waiter_receives_nothing() -> None:
    receiving = replace(WAITED, used_bytes_per_s=float(LEAST_BYTES_PER_S))
    assert divide({"p": PREFETCH, "w": receiving}, line(None))["p"] == HELD
    proving = replace(WAITED, used_bytes_per_s=0.0)
    assert divide({"p": PREFETCH, "w": proving}, line(None))["p"] == Pace(None, 4, True)
    stuck = replace(WAITED, used_bytes_per_s=LEAST_BYTES_PER_S - 1.0)
    assert divide({"p": PREFETCH, "w": stuck}, line(None))["p"] == Pace(None, 4, True)


def test_a_slow_waiter_leaves_its_share_to_the_other_waiter() -> None:
    slow = replace(WAITED, pace_bytes_per_s=50 * MB, used_bytes_per_s=10.0 * MB)
    assert rates(divide({"s": slow, "w": WAITED}, line(100 * MB))) == {"s": 15 * MB, "w": 85 * MB}


def test_a_source_has_caps_of_its_own() -> None:
    caps = line(100 * MB, None, hub=Limit(20 * MB, 3))
    hub = replace(WAITED, source="hub")
    paces = divide({"h1": hub, "h2": hub, "w": WAITED}, caps)
    assert paces == {
        "h1": Pace(10 * MB, 2, False),
        "h2": Pace(10 * MB, 1, False),
        "w": Pace(80 * MB, 4, False),
    }


def test_connections_go_to_waiters_first_and_who_gets_none_is_held() -> None:
    paces = divide({"p": PREFETCH, "v": WAITED, "w": WAITED}, line(100 * MB, 5))
    assert [paces[name].connections for name in ("v", "w", "p")] == [3, 2, 0]
    used = replace(WAITED, pace_bytes_per_s=50 * MB, used_bytes_per_s=1.0 * MB)
    paces = divide({"p": PREFETCH, "q": PREFETCH, "w": used}, line(100 * MB, 5))
    assert [paces[name].connections for name in ("w", "p", "q")] == [4, 1, 0]
    assert paces["q"] == HELD


@pytest.mark.parametrize(("share", "rate", "connections"), [(0.5, 20, 2), (0.25, 10, 1), (0.1, 4, 1)])
def test_under_pressure_a_prefetch_goes_at_a_share_of_its_best(
    share: float, rate: int, connections: int
) -> None:
    one = replace(PREFETCH, used_bytes_per_s=40.0 * MB, best_bytes_per_s=40.0 * MB)
    expected = {"p": Pace(rate * MB, connections, True), "w": Pace(None, 4, False)}
    done = replace(WAITED, used_bytes_per_s=0.0)
    assert divide({"p": one, "w": done}, line(None), share) == expected


def test_until_its_best_is_known_fewer_connections_have_to_do() -> None:
    assert divide({"p": PREFETCH}, line(None), 0.25) == {"p": Pace(None, 1, True)}
    assert divide({"p": PREFETCH}, line(None), 0.0) == {"p": Pace(PAUSED_BYTES_PER_S, 1, True)}


def test_at_no_share_at_all_prefetches_together_still_get_on() -> None:
    one = replace(PREFETCH, best_bytes_per_s=40.0 * MB)
    paces = divide({"p": one, "q": one}, line(None), 0.0)
    assert paces == {name: Pace(PAUSED_BYTES_PER_S // 2, 1, True) for name in ("p", "q")}


RATES = st.none() | st.integers(64 * 1024, 10**10)
LIMITS = st.builds(Limit, RATES, st.none() | st.integers(1, 40))
USED = st.none() | st.floats(0, 1e10)
TRANSFERS = st.builds(Running, st.sampled_from("abc"), st.booleans(), st.integers(1, 8), RATES, USED, USED)
ALL_CAPS = st.builds(Caps, LIMITS, st.dictionaries(st.sampled_from("ab"), LIMITS))


@given(st.dictionaries(st.integers(0, 20), TRANSFERS, max_size=12), ALL_CAPS, st.floats(0, 1))
def test_whatever_runs(running: dict[int, Running], caps: Caps, share: float) -> None:
    paces = divide(running, caps, share)
    assert set(paces) == set(running)
    for key, one in running.items():
        assert paces[key].background is one.background
        assert 0 <= paces[key].connections <= one.most_connections
    for name, limit in [("", caps.node), *caps.sources.items()]:
        members = [key for key, one in running.items() if name in ("", one.source)]
        moving = [paces[key] for key in members if paces[key] != HELD]
        check_sums(moving, limit)
        check_sums_are_fair([(running[key], paces[key]) for key in members])
    check_waiters(running, paces, caps)


def check_sums(paces: list[Pace], limit: Limit) -> None:
    if limit.connections is not None:
        assert sum(pace.connections for pace in paces) <= limit.connections
    if limit.rate_bytes_per_s is not None:
        assert sum(pace.rate_bytes_per_s or math.inf for pace in paces) <= limit.rate_bytes_per_s


def check_sums_are_fair(entries: list[tuple[Running, Pace]]) -> None:
    """Of one source, who could use all is not left behind another that nobody waits for more."""
    greedy = [
        (one.source, pace.rate_bytes_per_s or math.inf)
        for one, pace in entries
        if not one.background and one.used_bytes_per_s is None
    ]
    for source, rate in greedy:
        assert all(abs(rate - other) <= 1 for name, other in greedy if name == source) or math.isinf(rate)


def check_waiters(running: dict[int, Running], paces: dict[int, Pace], caps: Caps) -> None:
    waited = [key for key, one in running.items() if not one.background]
    for key in waited:
        limits = [caps.node, caps.sources.get(running[key].source, Limit())]
        assert paces[key].rate_bytes_per_s != 0
        if paces[key].connections == 0:
            # Only others that are waited for can have them all.
            assert any(is_full(running, paces, caps, limit, key) for limit in limits)
    hungry = [key for key in waited if running[key].used_bytes_per_s is None]
    for key in hungry:
        source = caps.sources.get(running[key].source, Limit())
        if source.rate_bytes_per_s is None:
            # It could use whatever the line gives: nobody that nobody waits for gets any of it.
            others = [p for k, p in paces.items() if running[k].background]
            left = LEAST_BYTES_PER_S
            assert all(p == HELD or (p.rate_bytes_per_s or 0) <= left for p in others)


def is_full(running: dict[int, Running], paces: dict[int, Pace], caps: Caps, limit: Limit, key: int) -> bool:
    members = [
        other
        for other, one in running.items()
        if not one.background and (limit is caps.node or one.source == running[key].source)
    ]
    return limit.connections is not None and (
        sum(paces[other].connections for other in members) == limit.connections
    )
