"""The owner of the state: its bound on claims, and what it tells those who wait."""

from __future__ import annotations

import time

import pytest
from plan_bench import Bench

from cached.model import DISK, CachedError, Claim, ClaimId, ClaimKind, Device, ErrorKind, Ref
from cached.node.core import Core
from cached.node.devices import meant, one_gpu
from cached.plan import State
from cached.plan import types as t


def a_claim(number: int) -> Claim:
    return Claim(ClaimId(f"lease-{number}"), ClaimKind.LEASE, Ref(f"http://o/{number}/"), DISK, time.time())


async def test_claims_are_bounded_before_and_after_they_are_worked_in() -> None:
    core = Core(State(fetch_slots=1), lambda action: None, most_claims=3)
    for number in range(3):
        core.claim(a_claim(number))
    for _ in range(2):
        with pytest.raises(CachedError) as caught:
            core.check_room()
        problem = caught.value.problem
        assert (problem.kind, problem.reason) == (ErrorKind.NO_ROOM, "TOO_MANY_CLAIMS")
        assert "3 claims" in problem.message and problem.hint and problem.temporary
        core.turn(time.time())
    core.end(ClaimId("lease-0"))
    core.turn(time.time())
    core.claim(a_claim(4))


async def test_an_answer_reaches_who_waits_and_nobody_else_is_needed() -> None:
    started: list[t.Action] = []
    core = Core(State(fetch_slots=1), started.append)
    future = core.claim(a_claim(0))
    core.turn(time.time())
    assert started == [t.Resolve(Ref("http://o/0/"))]
    core.answer(ClaimId("lease-0"))
    core.answer(ClaimId("lease-0"))
    assert future.result() is None


def test_a_number_means_one_gpu_and_none_of_several_instances() -> None:
    bench, one = Bench(), Device("cuda:MIG-1")
    bench.gpu(one, 100)
    assert one_gpu(bench.state, Device("cuda:0")) == one
    bench.gpu(Device("cuda:MIG-2"), 100)
    with pytest.raises(CachedError, match="2 instances of MIG") as caught:
        meant(bench.state, Device("cuda:0"))
    assert "cuda:MIG-1 or cuda:MIG-2" in caught.value.problem.hint
    bench.happen(t.StandbyGone(one))
    assert one_gpu(bench.state, one) == one, "its standby may only begin anew"
    with pytest.raises(CachedError):
        one_gpu(bench.state, Device("host"))
