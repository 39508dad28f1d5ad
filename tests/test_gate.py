"""The gate of a running fetch: what is told counts at once, and nobody waits for ever."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest

from cached.fetch.gate import Gate, GateClosedError
from cached.fetch.kernel import BACKGROUND_NICE, set_priority
from cached.fetch.wire import Pace
from cached.model import CachedError, ErrorKind, permanent, temporary

FREE = Pace(None, 2, False)
HELD = Pace(64 * 1024, 0, True)


def run(work: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """``work`` in a thread of its own, and what it answered or raised."""
    answers: list[object] = []

    def body() -> None:
        try:
            answers.append(work())
        except Exception as error:
            answers.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    return thread, answers


def ended(thread: threading.Thread, within_s: float = 5.0) -> bool:
    thread.join(within_s)
    return not thread.is_alive()


def test_a_new_rate_counts_also_for_who_pauses_already() -> None:
    gate = Gate(Pace(1000, 2, True))
    thread, answers = run(lambda: gate.passed(1_000_000, True))  # a thousand seconds
    assert not ended(thread, 0.1)
    gate.change(Pace(10_000_000, 2, True))
    assert ended(thread, 2) and answers == [False]


def test_what_is_owed_is_not_forgiven_by_a_change() -> None:
    gate = Gate(Pace(1_000_000, 2, True))
    began_s = time.monotonic()
    thread, _ = run(lambda: gate.passed(400_000, True))
    for rate in (999_999, 1_000_000, 1_000_001):
        time.sleep(0.05)
        gate.change(Pace(rate, 2, True))
    assert ended(thread)
    assert 0.38 < time.monotonic() - began_s < 1.5


def test_a_short_hold_is_sat_out_and_a_longer_one_gives_the_connection_up() -> None:
    gate = Gate(FREE)
    with gate.connection():
        gate.change(HELD)
        thread, answers = run(lambda: gate.passed(10_000_000, True))
        assert not ended(thread, 0.05)
        gate.change(FREE)
        assert ended(thread) and answers == [False]
        gate.change(HELD)
        began_s = time.monotonic()
        assert gate.passed(10_000_000, True)
        assert time.monotonic() - began_s < 1
    thread, _ = run(lambda: gate.connection().__enter__())
    assert not ended(thread, 0.05)
    gate.change(FREE)
    assert ended(thread)


def test_a_stream_is_read_slowly_while_it_is_held() -> None:
    gate = Gate(HELD)
    began_s = time.monotonic()
    assert not gate.passed(16 * 1024, False)
    assert 0.2 < time.monotonic() - began_s < 2


def test_as_many_leave_as_there_are_too_many() -> None:
    gate = Gate(Pace(None, 3, True))
    entered = [gate.connection() for _ in range(3)]
    for one in entered:
        one.__enter__()
    gate.change(Pace(None, 1, True))
    left = [gate.passed(1, True) for _ in range(3)]
    assert left == [True, True, False]
    for one in entered[:2]:
        one.__exit__(None, None, None)
    assert not gate.passed(1, True)


def test_connections_are_given_in_order_of_arrival() -> None:
    gate = Gate(Pace(None, 1, True))
    order: list[int] = []
    threads = []

    def use(number: int) -> None:
        with gate.connection():
            order.append(number)

    with gate.connection():
        for number in range(5):
            threads.append(run(lambda number=number: use(number))[0])
            time.sleep(0.02)
    assert all(ended(thread) for thread in threads)
    assert order == [0, 1, 2, 3, 4]


def test_closing_sends_everybody_away() -> None:
    gate = Gate(HELD)
    waiting = [run(lambda: gate.connection().__enter__()), run(lambda: gate.passed(10**9, False))]
    time.sleep(0.05)
    gate.close()
    for thread, answers in waiting:
        assert ended(thread)
        assert isinstance(answers[0], GateClosedError)


def test_an_origin_that_hung_up_on_a_held_connection_is_forgiven() -> None:
    gate, calls = Gate(FREE), 0
    cut = temporary("ORIGIN_BROKE_OFF", "cut", "wait", 0.0)

    def call() -> str:
        nonlocal calls
        calls += 1
        if calls == 1:
            gate.change(HELD)
            raise cut
        return "done"

    thread, answers = run(lambda: gate.forgiving(call))
    assert not ended(thread, 0.05)
    gate.change(FREE)
    assert ended(thread) and answers == ["done"] and calls == 2


@pytest.mark.parametrize(
    "error",
    [temporary("ORIGIN_BROKE_OFF", "cut", "wait", 0.0), permanent(ErrorKind.DATA_LOSS, "LIE", "lie", "mend")],
    ids=["nobody held it", "no hold excuses it"],
)
def test_other_errors_are_not(error: CachedError) -> None:
    gate = Gate(FREE)

    def call() -> None:
        if error.problem.reason == "LIE":
            gate.change(HELD)
        raise error

    with pytest.raises(CachedError) as caught:
        gate.forgiving(call)
    assert caught.value is error


def test_threads_have_the_fetchs_priority_also_when_it_changes() -> None:
    seen: list[tuple[int, bool]] = []

    def prioritise(thread_id: int, background: bool) -> bool:
        seen.append((thread_id, background))
        return True

    gate = Gate(Pace(None, 2, True), prioritise)
    with gate.working():
        here = threading.get_native_id()
        assert seen == [(here, True)]
        gate.change(Pace(1000, 2, True))
        gate.change(FREE)
        gate.change(Pace(1000, 2, False))
        assert seen == [(here, True), (here, False)] and not gate.is_too_low()
        gate.change(HELD)
        assert seen[2:] == [(here, True)]
    gate.change(FREE)
    assert len(seen) == 3


def test_where_the_kernel_lets_nobody_raise_it_a_thread_knows_that_it_is_too_low() -> None:
    gate = Gate(Pace(None, 2, True), lambda thread_id, background: background)
    with gate.working():
        assert not gate.is_too_low()
        gate.change(FREE)
        assert gate.is_too_low()
        gate.change(HELD)
        assert not gate.is_too_low()


def test_the_kernel_lowers_one_thread_and_says_whether_it_raises_it_again() -> None:
    found: list[int] = []

    def body() -> None:
        me = threading.get_native_id()
        before = os.getpriority(os.PRIO_PROCESS, me)
        assert set_priority(me, background=True)
        assert os.getpriority(os.PRIO_PROCESS, me) == max(before, BACKGROUND_NICE)
        raised = set_priority(me, background=False)
        assert os.getpriority(os.PRIO_PROCESS, me) == (before if raised else BACKGROUND_NICE)
        found.append(before)

    thread, answers = run(body)
    assert ended(thread) and answers == [None]
    assert found == [os.getpriority(os.PRIO_PROCESS, 0)]
