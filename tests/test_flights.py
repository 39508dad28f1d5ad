"""One fetch for one content: who may begin it, who hears of it, and that nobody waits in a circle."""

from __future__ import annotations

import threading
import time

from hypothesis import given
from hypothesis import strategies as st

from cached.fetch.flights import BEGINS_S, LOOKS_BACK_S, Flight, Flights, Usage
from cached.fetch.todo import Todo
from cached.fetch.wire import Have, Order, Taken, Yours
from cached.model import Blob, Digest, FileSpec, Ref, Revision, RevisionKey


def digest(name: str) -> Digest:
    return Digest(name.encode().hex().ljust(64, "0"))


def revision(name: str, contents: str) -> Revision:
    files = tuple(FileSpec(f"{i}", 1, digest(content)) for i, content in enumerate(contents))
    return Revision(Ref(f"http://origin/{name}/"), RevisionKey(name), files)


def blob(name: str) -> Blob:
    return Blob(digest(name), 1, ("0" * 32,))


X, Y = digest("x"), digest("y")


def test_who_asks_first_fetches_and_the_others_hear_when_it_is_there() -> None:
    flights = Flights()
    a, b, c = (flights.begin(revision(name, "x"), True) for name in "abc")
    assert flights.claim(b, X) == Yours(X)
    assert flights.claim(b, X) == Yours(X)
    assert flights.claim(a, X) == Taken(X)
    assert flights.committed(b, blob("x")) == [(a, Have(blob("x")))]
    # Who asks only now is told at once; and so is whoever began before it was there and asks again.
    assert flights.claim(c, X) == Have(blob("x"))
    assert flights.claim(b, X) == Have(blob("x"))


def test_who_begins_after_a_commit_finds_it_on_disk_and_is_told_nothing() -> None:
    flights = Flights()
    a = flights.begin(revision("a", "x"), True)
    flights.claim(a, X)
    flights.committed(a, blob("x"))
    assert flights.claim(flights.begin(revision("b", "x"), True), X) == Yours(X)


def test_what_one_leaves_goes_to_another_first_to_one_that_is_waited_for() -> None:
    flights = Flights()
    a, b, c = (flights.begin(revision(name, "xy"), name != "c") for name in "abc")
    assert [flights.claim(one, X) for one in (a, b, c)] == [Yours(X), Taken(X), Taken(X)]
    assert flights.end(a) == [(c, Yours(X))]
    assert flights.end(b) == []
    assert flights.committed(c, blob("x")) == []
    assert flights.end(c) == [] and not list(flights)


def test_what_a_waiter_depends_on_is_waited_for() -> None:
    flights = Flights()
    a, b, c = (flights.begin(revision(name, "xy"), True) for name in "abc")
    flights.claim(a, X)
    flights.claim(b, X)
    flights.claim(b, Y)
    flights.claim(c, Y)
    assert flights.urgent() == set()
    c.background = False
    assert flights.urgent() == {"a", "b", "c"}
    flights.committed(a, blob("x"))
    assert flights.urgent() == {"b", "c"}


CONTENTS = "uvwxyz"
STEPS = st.lists(st.tuples(st.sampled_from(["work", "fail"]), st.integers(0, 99)), max_size=120)


@given(st.lists(st.text(CONTENTS, min_size=1, max_size=6), min_size=1, max_size=6), STEPS)
def test_whatever_crosses_all_get_everything_and_nothing_comes_twice(
    wanted: list[str], steps: list[tuple[str, int]]
) -> None:
    world = World(wanted)
    for kind, number in steps:
        world.fail(number) if kind == "fail" else world.work(number)
    world.finish()


class World:
    """Fetches that begin together, each with its contents to go through in order."""

    def __init__(self, wanted: list[str]) -> None:
        self.flights = Flights()
        self.disk: set[Digest] = set()
        self.fetched: list[Digest] = []
        self.todo: dict[Flight, list[Digest]] = {}
        self.waits: dict[Flight, set[Digest]] = {}
        self.in_hand: dict[Flight, Digest] = {}
        self.failed = 0
        for number, contents in enumerate(wanted):
            flight = self.flights.begin(revision(str(number), contents), number % 2 == 0)
            self.todo[flight] = [digest(content) for content in dict.fromkeys(contents)]
            self.waits[flight] = set()

    def work(self, number: int) -> bool:
        """One of them does its next step: finishes what it has in hand, or asks for the next."""
        able = [f for f in self.todo if f in self.in_hand or self.todo[f]]
        if not able:
            return False
        flight = able[number % len(able)]
        if flight in self.in_hand:
            found = self.in_hand.pop(flight)
            assert found not in self.disk, "fetched though it was there"
            self.disk.add(found)
            self.fetched.append(found)
            for other, order in self.flights.committed(flight, Blob(found, 1, ())):
                self.hear(other, order)
        else:
            wanted = self.todo[flight].pop(0)
            self.hear(flight, self.flights.claim(flight, wanted))
        return True

    def hear(self, flight: Flight, order: Order) -> None:
        match order:
            case Yours(digest=wanted):
                self.waits[flight].discard(wanted)
                if flight in self.in_hand:
                    self.todo[flight].insert(0, wanted)  # asks again once its hands are free
                else:
                    self.in_hand[flight] = wanted
            case Taken(digest=wanted):
                self.waits[flight].add(wanted)
            case Have(blob=found):
                assert found.sha256 in self.disk
                self.waits[flight].discard(found.sha256)

    def fail(self, number: int) -> None:
        if len(self.todo) < 2:
            return
        flight = list(self.todo)[number % len(self.todo)]
        self.failed += 1
        for kept in (self.todo, self.waits, self.in_hand):
            kept.pop(flight, None)  # type: ignore[attr-defined]
        for other, order in self.flights.end(flight):
            self.hear(other, order)

    def finish(self) -> None:
        while self.work(0):
            pass
        assert not any(self.waits.values()), "somebody waits for ever"
        assert len(self.fetched) == len(set(self.fetched))
        for flight in self.todo:
            assert flight.wants <= self.disk
            assert not self.flights.end(flight)
        assert not list(self.flights) and not self.flights.urgent()


# --- what one receives ------------------------------------------------------------------------


def test_a_fetch_that_has_just_begun_is_not_taken_for_one_that_receives_nothing() -> None:
    usage = Usage(began_s=100.0)
    usage.look(100.2)
    assert usage.most_bytes_per_s(100.2) is None
    assert usage.most_bytes_per_s(100.0 + BEGINS_S) == 0.0


def test_the_highest_rate_of_the_last_second_counts() -> None:
    usage = Usage(began_s=100.0)
    for at_s, origin_bytes in ((100.25, 1000), (100.5, 1500), (100.75, 1500)):
        usage.origin_bytes = origin_bytes
        usage.look(at_s)
    assert usage.most_bytes_per_s(100.75) == 4000.0 and usage.best_bytes_per_s() is None
    usage.look(100.3 + LOOKS_BACK_S)
    assert usage.most_bytes_per_s(100.3 + LOOKS_BACK_S) == 2000.0
    usage.look(103.0)
    assert usage.most_bytes_per_s(103.0) == 0.0 and usage.best_bytes_per_s() == 4000.0


# --- the worker's side ------------------------------------------------------------------------


def test_a_file_is_asked_for_just_before_it_is_begun() -> None:
    asked: list[Digest] = []
    todo = Todo(asked.append)
    for index, content in enumerate((X, Y, None)):
        todo.add(index, content)
    answers: list[object] = []
    thread = threading.Thread(target=lambda: answers.append(todo.take()), daemon=True)
    thread.start()
    wait_for(lambda: asked == [X])
    assert not answers
    todo.hear(Yours(X))
    thread.join(5)
    assert answers == [(0, None)] and asked == [X]


def test_what_is_taken_comes_back_last_as_a_blob_or_to_be_fetched() -> None:
    todo = Todo(lambda wanted: todo.hear(Taken(wanted)))
    for index, content in enumerate((X, Y, None, X)):
        todo.add(index, content)
    assert todo.take() == (2, None)
    answers: list[object] = []
    thread = threading.Thread(target=lambda: answers.extend(todo.take() for _ in range(4)), daemon=True)
    thread.start()
    todo.hear(Have(blob("x")))
    todo.hear(Yours(Y))
    thread.join(5)
    assert answers == [(0, blob("x")), (3, blob("x")), (1, None), None]


def test_one_content_in_two_files_is_asked_for_once() -> None:
    asked: list[Digest] = []

    def ask(wanted: Digest) -> None:
        asked.append(wanted)
        todo.hear(Yours(wanted))

    todo = Todo(ask)
    todo.add(0, X)
    todo.add(1, X)
    assert [todo.take(), todo.take(), todo.take()] == [(0, None), (1, None), None]
    assert asked == [X]


def test_closing_ends_the_waiting() -> None:
    todo = Todo(lambda wanted: None)
    todo.add(0, X)
    answers: list[object] = []
    thread = threading.Thread(target=lambda: answers.append(todo.take()), daemon=True)
    thread.start()
    time.sleep(0.02)
    todo.close()
    thread.join(5)
    assert answers == [None]


def wait_for(condition: object) -> None:
    deadline = time.monotonic() + 5
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.005)
