"""What the planner does with GPUs, policy by policy; what must hold whatever happens is in
test_plan_machine."""

from __future__ import annotations

from dataclasses import replace

import pytest
from plan_bench import ID, NO_WATERMARKS, A, B, Bench, C, D, E, G, make_claim, only, the_refusal
from plan_world import START, make_revision

from cached.model import (
    ANY_GPU,
    DISK,
    EVERY_GPU,
    HOST,
    ClaimId,
    ClaimKind,
    Device,
    ErrorKind,
    Problem,
    Revision,
    Room,
)
from cached.plan import evict_problem, swap_problem
from cached.plan import types as t
from cached.plan.memory import FIRST_PAUSE_S, LAST_PAUSE_S, pause_s
from cached.plan.words import STANDBY_WAIT_S

X, Y = Device("cuda:GPU-x"), Device("cuda:GPU-y")
RULES = replace(NO_WATERMARKS, gpu_reserve_bytes=5)
HELD = Problem(ErrorKind.UNAVAILABLE, "HELD_OUTSIDE", "pid 7 has it mapped", "stop it", 5.0)


def bench_with(*revisions: Revision, free_bytes: int = 100) -> Bench:
    """These on disk, and one GPU of 100 bytes, 5 of which are the reserve."""
    bench = Bench(disk_bytes=1000, rules=RULES)
    bench.recover(*revisions)
    bench.gpu(X, free_bytes)
    return bench


def pin(bench: Bench, revision: Revision, device: Device = X, **more: object) -> ClaimId:
    return bench.claim(revision, ClaimKind.PIN, device, **{"unclaimed": True, **more})


def stand(bench: Bench, revision: Revision, free_bytes: int, device: Device = X) -> None:
    """A load that was begun ends, and the device's figures follow."""
    bench.loaded(revision, device)
    bench.gpu_has(device, free_bytes)
    bench.now += 2.0


def released(actions: list[t.Action]) -> set[object]:
    return {(a.device, a.artifact) for a in actions if isinstance(a, t.Release)}


# --- from where -----------------------------------------------------------------------------


def test_a_lease_is_met_from_the_first_that_it_prefers_and_that_has_it() -> None:
    bench = bench_with(A)
    bench.standby(A)
    wish = {"prefers": (Y, X, HOST)}
    on_host = bench.claim(A, **wish)
    assert bench.tick() == [t.Grant(on_host, HOST)]
    pin(bench, A)
    assert bench.tick() == [t.Load(X, ID[A.ref])]
    meanwhile = bench.claim(A, device=HOST, prefers=(X,))
    assert bench.tick() == [t.Grant(meanwhile, HOST)], "nobody waits for what he prefers"
    stand(bench, A, 70)
    on_gpu = bench.claim(A, device=HOST, prefers=(X,))
    assert bench.tick() == [t.Grant(on_gpu, X)]
    assert bench.state.claims[on_gpu].device == X and bench.state.residencies[X, ID[A.ref]].hits == 1
    bench.gpu_has(X, 70, unfit="an ECC error")
    elsewhere = bench.claim(A, device=HOST, prefers=(X,))
    assert bench.tick() == [t.Grant(elsewhere, HOST)], "and the leased one stays, and is given to nobody else"


def test_only_pins_load_onto_a_gpu() -> None:
    bench = bench_with(A, B)
    bench.claim(A, device=X)
    assert the_refusal(bench.tick()).reason == "NOT_PINNED"
    bench.standby()
    bench.claim(B, device=HOST, prefers=(X,))
    assert bench.tick() == [t.Load(HOST, ID[B.ref])]
    bench.loaded(B)
    pin(bench, B)
    waits = bench.claim(B, device=X)
    actions = bench.tick()
    assert only(actions, t.Load) == [t.Load(X, ID[B.ref])] and len(only(actions, t.Grant)) == 1
    bench.loaded(B, X)
    assert bench.tick() == [t.Grant(waits, X)]


def test_what_has_no_tensors_is_refused_for_good() -> None:
    bench = bench_with(C)
    pin(bench, C)
    bench.claim(C, device=X)
    problem = the_refusal(bench.tick())
    assert problem.reason == "NO_TENSORS" and not problem.temporary


def test_a_pin_that_does_not_fit_says_so_with_the_numbers_and_who_holds_the_rest() -> None:
    bench = bench_with(D, G)
    pin(bench, D)
    bench.tick()
    stand(bench, D, 60)
    lease = bench.claim(D, device=HOST, prefers=(X,))
    assert bench.tick() == [t.Grant(lease, X)]
    pin(bench, G, priority=9)
    bench.claim(G, device=X)
    problem = the_refusal(bench.tick())
    assert problem.reason == "DEVICE_CAPACITY" and problem.temporary
    for words in ("needs 70 B", "capacity is 95 B, 60 B are free, of which 5 B stay so", "give back 0 B"):
        assert words in problem.message
    assert "d (40 B, held by a lease and 1 more)" in problem.message


def test_a_pin_pushes_out_what_only_lower_pins_want_and_nothing_else() -> None:
    bench = bench_with(D, G, E)
    low, _ = pin(bench, D, priority=1), pin(bench, E, priority=2)
    assert bench.tick() == [t.Load(X, ID[E.ref])], "the higher first, though it came later"
    stand(bench, E, 80)
    assert bench.tick() == [t.Load(X, ID[D.ref])]
    stand(bench, D, 40)
    equal = pin(bench, G, priority=1)
    assert not only(bench.tick(), t.Release) and bench.state.residencies[X, ID[G.ref]].problem
    bench.happen(t.ClaimEnded(equal))
    pin(bench, G, priority=2)
    assert released(bench.tick()) == {(X, ID[D.ref])}
    bench.released(D, X)
    assert bench.tick() == [], "the figures may be older than the release, so the room is waited for"
    bench.gpu_has(X, 80)
    assert bench.tick() == [t.Load(X, ID[G.ref])]
    stand(bench, G, 10)
    assert not only(bench.tick(), t.Load) and bench.state.claims[low].device == X


# --- one plan for a swap --------------------------------------------------------------------


def test_a_swap_releases_the_one_for_the_other_in_one_plan() -> None:
    bench = bench_with(D, G)
    old = pin(bench, D)
    bench.tick()
    stand(bench, D, 60)
    bench.now += 60.0
    assert swap_problem(bench.state, X, ID[D.ref], ID[G.ref]) is None
    bench.happen(t.ClaimEnded(old))
    pin(bench, G)
    assert released(bench.tick()) == {(X, ID[D.ref])}
    bench.gpu_has(X, 100)
    assert bench.tick() == []
    bench.released(D, X)
    assert bench.tick() == [t.Load(X, ID[G.ref])]


def test_a_swap_that_cannot_be_is_known_before() -> None:
    bench = bench_with(D, G, E)
    pin(bench, D)
    bench.tick()
    stand(bench, D, 50)
    told = swap_problem(bench.state, X, ID[D.ref], ID[G.ref])
    assert told is None, "50 free, and 40 that come back"
    bench.gpu_has(X, 30)
    told = swap_problem(bench.state, X, ID[D.ref], ID[G.ref])
    assert told is not None and "needs 70 B" in told.message and "give back 40 B" in told.message
    bench.gpu_has(X, 60)
    lease = bench.claim(D, device=HOST, prefers=(X,))
    assert bench.tick() == [t.Grant(lease, X)]
    told = swap_problem(bench.state, X, ID[D.ref], ID[G.ref])
    assert told is not None and "held by a lease" in told.message
    unknown = swap_problem(bench.state, Y, None, ID[G.ref])
    assert unknown is not None and unknown.reason == "NO_SUCH_DEVICE" and X in unknown.message


# --- room -----------------------------------------------------------------------------------


def test_room_is_made_of_the_coldest_before_the_grant_and_then_nothing_moves() -> None:
    bench = bench_with(A, B, E, D)
    bench.standby(D)
    for revision, free_bytes in ((A, 70), (B, 40), (E, 20)):
        pin(bench, revision)
        bench.tick()
        stand(bench, revision, free_bytes)
    warm = bench.claim(A, device=HOST, prefers=(X,))
    bench.tick()
    bench.happen(t.ClaimEnded(warm))
    lease = bench.claim(D, device=HOST, room=Room(X, 65))
    assert released(bench.tick()) == {(X, ID[B.ref]), (X, ID[E.ref])}, "the warmest stays"
    bench.released(B, X)
    bench.released(E, X)
    assert bench.tick() == []
    bench.gpu_has(X, 70)
    assert bench.tick() == [t.Grant(lease, HOST)]
    later = bench.claim(D, device=HOST, room=Room(X, 30))
    pin(bench, E)
    bench.now += 100.0
    assert bench.tick() == [], "the first is starting: no load, and no room for the next"
    bench.gpu_has(X, 40)
    bench.happen(t.HolderReady(lease))
    assert bench.tick() == [t.Grant(later, HOST)]
    bench.now += RULES.starting_s
    assert bench.tick() == [t.Load(X, ID[B.ref])]


def test_room_never_costs_what_the_same_lease_prefers() -> None:
    bench = bench_with(A, B)
    for revision, free_bytes in ((A, 70), (B, 40)):
        pin(bench, revision)
        bench.tick()
        stand(bench, revision, free_bytes)
    lease = bench.claim(A, device=HOST, prefers=(X,), room=Room(X, 70))
    assert released(bench.tick()) == {(X, ID[B.ref])}
    bench.released(B, X)
    bench.gpu_has(X, 70)
    assert bench.tick() == [t.Grant(lease, X)]


def test_what_a_lease_is_about_to_be_given_does_not_leave_while_it_waits_for_room() -> None:
    bench = bench_with(D, G)
    bench.gpu(Y, 100)
    bench.standby()
    pin(bench, D)
    bench.tick()
    stand(bench, D, 60)
    starts = bench.claim(G, room=Room(Y, 90))
    assert bench.tick() == [t.Grant(starts, DISK)]
    lease = bench.claim(D, device=HOST, prefers=(X,), room=Room(Y, 50))
    pin(bench, G, priority=1)
    actions = bench.tick()
    assert not only(actions, t.Release) and len(only(actions, t.CannotLoad)) == 1
    bench.happen(t.ClaimEnded(starts))
    assert t.Grant(lease, X) in bench.tick()


def test_room_that_cannot_be_had_is_refused_at_once_with_the_arithmetic() -> None:
    bench = bench_with(D, A)
    for revision, free_bytes in ((D, 60), (A, 30)):
        pin(bench, revision)
        bench.tick()
        stand(bench, revision, free_bytes)
    holder = bench.claim(D, device=HOST, prefers=(X,))
    assert bench.tick() == [t.Grant(holder, X)]
    # Nothing is known of G yet: its room is refused all the same.
    bench.claim(G, room=Room(X, 61))
    problem = the_refusal(bench.tick())
    assert problem.reason == "NO_ROOM" and problem.temporary
    assert "61 B cannot be made free" in problem.message and "30 B are free" in problem.message
    assert "would give back 30 B" in problem.message and "d (40 B, held by" in problem.message
    bench.claim(D, room=Room(X, 101))
    assert not the_refusal(bench.tick()).temporary
    bench.claim(D, room=Room(Y, 10))
    problem = the_refusal(bench.tick())
    assert problem.reason == "NO_SUCH_DEVICE" and X in problem.message
    bench.gpu_has(X, 30, unfit="it fell off the bus")
    bench.claim(D, room=Room(X, 10))
    assert the_refusal(bench.tick()).reason == "GPU_UNFIT"


def test_room_is_not_refused_for_what_a_failed_load_has_just_given_back() -> None:
    bench = bench_with(D)
    pin(bench, D)
    bench.tick()
    bench.gpu_has(X, 30)
    bench.happen(t.LoadFailed(X, ID[D.ref], HELD))
    lease = bench.claim(D, room=Room(X, 60))
    assert bench.tick() == []
    bench.gpu_has(X, 70)
    assert bench.tick() == [t.Grant(lease, DISK)]


def test_room_is_not_refused_while_a_load_shares_what_may_leave() -> None:
    more = make_revision("ae", "ae")
    bench = bench_with(A, more)
    old = pin(bench, A)
    bench.tick()
    stand(bench, A, 70)
    bench.happen(t.ClaimEnded(old))
    pin(bench, more)
    assert only(bench.tick(), t.Load)
    lease = bench.claim(A, room=Room(X, 96))
    assert not only(bench.tick(), t.Refuse) and lease in bench.state.claims


def test_room_is_refused_at_once_when_somebody_takes_what_it_was_to_be_made_of() -> None:
    bench = bench_with(A, D)
    pin(bench, D)
    bench.tick()
    bench.loaded(D, X)
    bench.gpu_has(X, 60)
    waits = bench.claim(A, room=Room(X, 90))
    assert bench.tick() == []
    bench.now += 2.0
    takes = bench.claim(D, device=HOST, prefers=(X,))
    actions = bench.tick()
    assert only(actions, t.Grant) == [t.Grant(takes, X)]
    assert [a.claim for a in only(actions, t.Refuse)] == [waits]  # type: ignore[union-attr]


def test_room_on_a_gpu_that_may_still_connect_is_waited_for() -> None:
    bench = Bench(rules=RULES)
    bench.recover(A)
    bench.claim(A, room=Room(X, 10))
    lease = bench.claim(A, room=Room(X, 20))
    assert bench.tick() == []
    bench.gpu(X, 100)
    assert len(only(bench.tick(), t.Grant)) == 2 and lease in bench.state.starting
    bench.happen(t.StandbyGone(X))
    bench.claim(A, room=Room(X, 10))
    assert bench.tick() == []
    bench.now += STANDBY_WAIT_S
    assert the_refusal(bench.tick()).reason == "NO_STANDBY"


# --- whose GPU ------------------------------------------------------------------------------


def test_pins_stand_on_a_gpu_that_is_given_to_nobody_only_where_they_say_so() -> None:
    bench = bench_with(A, B)
    pin(bench, A)
    pin(bench, B, unclaimed=False)
    bench.claim(B, device=X)
    actions = bench.tick()
    assert only(actions, t.Load) == [t.Load(X, ID[A.ref])]
    assert the_refusal(actions).reason == "UNCLAIMED_GPU"
    told = bench.state.residencies[X, ID[B.ref]].problem
    assert told is not None and "unclaimed = true" in told.hint


def test_a_gpu_that_is_given_away_is_left_but_for_what_is_leased_in_time() -> None:
    bench = bench_with(A, B, E)
    bench.happen(t.GpusClaimed({}))
    for revision, free_bytes in ((A, 70), (B, 40)):
        pin(bench, revision)
        bench.tick()
        stand(bench, revision, free_bytes)
    pin(bench, E, unclaimed=False)
    bench.tick()
    bench.now += 60.0
    bench.gpu_has(X, 45)
    bench.happen(t.GpusClaimed({X: "default/web"}))
    assert bench.tick() == [t.Load(X, ID[E.ref])], "loaded now, for a tenant that comes soon"
    lease = bench.claim(A, device=HOST, prefers=(X,))
    assert bench.tick() == [t.Grant(lease, X)]
    stand(bench, E, 20)
    bench.now += RULES.claimed_grace_s - 2.0
    assert released(bench.tick()) == {(X, ID[B.ref]), (X, ID[E.ref])}
    bench.released(B, X)
    bench.released(E, X)
    bench.gpu_has(X, 70)
    actions = bench.tick()
    assert not only(actions, t.Load)
    told = bench.state.residencies[X, ID[E.ref]].problem
    assert told is not None and told.reason == "CLAIMED_GPU" and "default/web" in told.message
    bench.happen(t.ClaimEnded(lease))
    assert not bench.tick(), "its next replica may come at once"
    bench.now += RULES.claimed_grace_s
    assert released(bench.tick()) == {(X, ID[A.ref])}
    bench.released(A, X)
    bench.gpu_has(X, 100)
    bench.now += 10.0
    bench.tick()
    bench.happen(t.GpusClaimed({}))
    assert len(only(bench.tick(), t.Load)) == 1, "what is for unclaimed GPUs comes back"


def test_a_daemon_that_starts_beside_a_tenant_loads_nothing_onto_its_gpu() -> None:
    bench = bench_with(A)
    bench.now += 60.0
    bench.happen(t.GpusClaimed({X: "default/web"}))
    old = make_claim("pin", A, ClaimKind.PIN, X, START)
    bench.happen(t.ClaimMade(replace(old, unclaimed=True)))
    assert only(bench.tick(), t.CannotLoad)
    bench.happen(t.GpusClaimed({X: "default/other"}))
    assert bench.tick() == [t.Load(X, ID[A.ref])]


def test_what_no_pin_wants_any_more_leaves_its_gpu() -> None:
    bench = bench_with(A)
    only_pin = pin(bench, A)
    bench.tick()
    stand(bench, A, 70)
    bench.now += 60.0
    lease = bench.claim(A, device=HOST, prefers=(X,))
    bench.tick()
    bench.happen(t.ClaimEnded(only_pin))
    assert bench.tick() == []
    bench.happen(t.ClaimEnded(lease))
    bench.now += RULES.claimed_grace_s
    assert released(bench.tick()) == {(X, ID[A.ref])}


# --- memory that others take ----------------------------------------------------------------


def test_below_the_reserve_the_coldest_leaves_and_comes_back_only_with_room_to_spare() -> None:
    bench = bench_with(A, B)
    for revision, free_bytes in ((A, 70), (B, 40)):
        pin(bench, revision)
        bench.tick()
        stand(bench, revision, free_bytes)
    lease = bench.claim(A, device=HOST, prefers=(X,))
    bench.tick()
    bench.gpu_has(X, 4)
    (release,) = bench.tick()
    assert isinstance(release, t.Release) and release.artifact == ID[B.ref] and release.thrown
    bench.released(B, X)
    bench.gpu_has(X, 2)
    bench.now += 2.0
    assert not only(bench.tick(), t.Release), "what is leased never leaves"
    bench.gpu_has(X, 39)
    bench.now += LAST_PAUSE_S
    assert not only(bench.tick(), t.Load), "that would fit, and be thrown out again"
    bench.gpu_has(X, 40)
    bench.now += 300.0
    assert bench.tick() == [t.Load(X, ID[B.ref])]
    assert lease in bench.state.answered


def test_each_time_that_it_is_thrown_out_the_pause_doubles_until_it_stood_for_long() -> None:
    assert [pause_s(n) for n in (1, 2, 3, 30)] == [FIRST_PAUSE_S, 60.0, 120.0, LAST_PAUSE_S]
    bench = bench_with(A)
    pin(bench, A)
    for times in (1, 2, 3):
        while not only(bench.tick(), t.Load):
            bench.now += 1.0
        stand(bench, A, 70)
        bench.gpu_has(X, 0)
        assert only(bench.tick(), t.Release)
        assert bench.state.thrown[X, ID[A.ref]].times == times
        bench.released(A, X)
        bench.gpu_has(X, 100)
    while not only(bench.tick(), t.Load):
        bench.now += 1.0
    stand(bench, A, 70)
    bench.now += 2 * LAST_PAUSE_S
    bench.gpu_has(X, 0)
    assert only(bench.tick(), t.Release) and bench.state.thrown[X, ID[A.ref]].times == 2


def test_two_models_that_fit_only_alone_do_not_thrash_whoever_uses_them() -> None:
    """A day of alternating use, and of an engine that takes and gives back memory every ten minutes."""
    bench = bench_with(G, D)  # 70 and 40 of 95 bytes
    bench.standby(capacity_bytes=1000)
    pin(bench, G, priority=1)
    pin(bench, D, priority=0)
    loads = [0, 0]
    for minute in range(24 * 60):
        bench.now = START + minute * 60.0
        taken = 50 if minute % 20 > 10 and minute > 12 * 60 else 0
        lease = bench.claim((G, D)[minute % 2], device=HOST, prefers=(X,))
        for _ in range(4):
            standing = [a for d, a in bench.state.residencies if d == X and bench.state.is_resident(X, a)]
            used = sum(size for a in standing for _, size in bench.state.artifacts[a].artifact.images)
            bench.gpu_has(X, max(0, 100 - used - taken))
            actions = bench.tick()
            for action in actions:
                if isinstance(action, t.Load):
                    loads[action.device == X] += 1
                    bench.loaded({ID[G.ref]: G, ID[D.ref]: D}[action.artifact], action.device)
                elif isinstance(action, t.Release):
                    bench.happen(t.Released(action.device, action.artifact))
            bench.now += 1.0
        assert lease in bench.state.answered
        bench.happen(t.ClaimEnded(lease))
        assert loads[1] == 1 or minute > 12 * 60, "use alone moves nothing"
    # One an hour and those of the doubling before, and the smaller one in between.
    assert loads[1] <= 2 * (12 + 7) + 1


# --- unfit, gone, held outside --------------------------------------------------------------


def test_an_unfit_gpu_is_left_and_refuses_whoever_wants_just_that() -> None:
    bench = bench_with(A, B)
    pin(bench, A)
    bench.tick()
    stand(bench, A, 70)
    bench.gpu_has(X, 70, unfit="an uncorrectable ECC error")
    bench.claim(A, device=X)
    actions = bench.tick()
    assert the_refusal(actions).reason == "GPU_UNFIT" and released(actions) == {(X, ID[A.ref])}
    bench.released(A, X)
    pin(bench, B)
    bench.claim(B, device=X)
    problem = the_refusal(bench.tick())
    assert problem.reason == "GPU_UNFIT" and problem.temporary and "ECC" in problem.message
    bench.gpu_has(X, 100)
    assert len(only(bench.tick(), t.Load)) == 1, "at once, once it is fit"


def test_memory_that_somebody_has_mapped_is_shown_and_not_counted_on() -> None:
    bench = bench_with(D, G, E)
    old = pin(bench, D)
    bench.tick()
    stand(bench, D, 60)
    bench.happen(t.ClaimEnded(old))
    pin(bench, G)
    assert released(bench.tick()) == {(X, ID[D.ref])}
    bench.happen(t.HeldOutside(X, ID[D.ref], HELD))
    assert only(bench.tick(), t.CannotLoad) and not bench.tick()
    pin(bench, E)
    assert bench.tick() == [t.Load(X, ID[E.ref])], "what fits beside it is loaded"
    stand(bench, E, 40)
    pin(bench, D)
    bench.claim(D, device=X)
    assert the_refusal(bench.tick()) == HELD
    bench.released(D, X)
    bench.gpu_has(X, 80)
    assert bench.tick() == [t.Load(X, ID[D.ref])]


# --- pools ----------------------------------------------------------------------------------


def two_gpus(*revisions: Revision) -> Bench:
    bench = bench_with(*revisions, free_bytes=60)
    bench.gpu(Y, 100)
    return bench


def placed(bench: Bench) -> set[Device]:
    return {bench.state.claims[member].device for member in bench.state.members}


def test_a_pool_places_its_copies_apart_by_free_memory_and_leaves_them_there() -> None:
    bench = two_gpus(D, A)
    pool = pin(bench, D, ANY_GPU)
    assert bench.tick() == [t.Place(pool, Y), t.Load(Y, ID[D.ref])]
    waits = bench.claim(D, device=ANY_GPU)
    assert bench.tick() == []
    stand(bench, D, 60, Y)
    assert bench.tick() == [t.Grant(waits, Y)]
    bench.happen(t.ClaimEnded(waits))
    bench.gpu_has(X, 100)
    assert bench.tick() == [], "it moves for nobody's convenience"
    pin(bench, A, ANY_GPU, copies=3)
    bench.tick()
    told = bench.state.residencies[ANY_GPU, ID[A.ref]].problem
    assert placed(bench) == {X, Y} and told is not None and "2 of 3 copies" in told.message
    assert evict_problem(bench.state, ID[D.ref]).message.count("a pin") == 1  # type: ignore[union-attr]
    bench.happen(t.ClaimEnded(pool))
    assert {bench.state.claims[m].artifact for m in bench.state.members} == {ID[A.ref]}


def test_what_could_not_be_is_forgotten_with_its_pin() -> None:
    bench = two_gpus(A, D, G)
    pool = pin(bench, A, ANY_GPU, copies=5)
    bench.tick()
    stand(bench, A, 20)
    large = pin(bench, G)
    bench.tick()
    short = bench.state.residencies[ANY_GPU, ID[A.ref]].problem
    assert short is not None and "2 of 5" in short.message and short.message.endswith("2 GPUs are connected")
    assert bench.state.residencies[X, ID[G.ref]].problem
    for ended in (pool, large):
        bench.happen(t.ClaimEnded(ended))
    assert not any(residency.problem for residency in bench.state.residencies.values())


def test_a_copy_moves_when_its_device_is_gone_for_long_unfit_or_given_away() -> None:
    bench = two_gpus(A)
    pin(bench, A, ANY_GPU)
    bench.tick()
    stand(bench, A, 70, Y)
    bench.happen(t.StandbyGone(Y))
    assert bench.tick() == []
    bench.now += STANDBY_WAIT_S
    actions = bench.tick()
    assert placed(bench) == {X} and only(actions, t.Load) == [t.Load(X, ID[A.ref])]
    bench.gpu(Y, 70, A)
    stand(bench, A, 30)
    bench.gpu_has(X, 30, unfit="XID 79")
    actions = bench.tick()
    assert placed(bench) == {Y} and released(actions) == {(X, ID[A.ref])} and not only(actions, t.Load)
    bench.released(A, X)
    bench.gpu_has(X, 60)
    bench.happen(t.GpusClaimed({}), t.GpusClaimed({Y: "default/web"}))
    bench.now += RULES.claimed_grace_s
    assert released(bench.tick()) == {(Y, ID[A.ref])}
    bench.released(A, Y)
    bench.tick()
    assert placed(bench) == {X}


def test_a_copy_that_had_to_leave_goes_where_there_is_room() -> None:
    bench = two_gpus(A)
    pin(bench, A, ANY_GPU)
    bench.tick()
    stand(bench, A, 70, Y)
    bench.gpu_has(Y, 1)
    assert released(bench.tick()) == {(Y, ID[A.ref])}
    bench.released(A, Y)
    bench.gpu_has(Y, 31)
    actions = bench.tick()
    assert placed(bench) == {X} and only(actions, t.Load) == [t.Load(X, ID[A.ref])]


def test_a_pin_on_every_gpu_says_where_it_cannot_be() -> None:
    bench = two_gpus(G, D)
    pool = pin(bench, G, EVERY_GPU)
    waits = bench.claim(G, device=EVERY_GPU)
    actions = bench.tick()
    assert placed(bench) == {X, Y}
    assert only(actions, t.Load) == [t.Load(Y, ID[G.ref])]
    (cannot,) = only(actions, t.CannotLoad)
    assert (
        isinstance(cannot, t.CannotLoad) and cannot.device == X and "60 B are free" in cannot.problem.message
    )
    assert the_refusal(actions).message == cannot.problem.message and waits not in bench.state.claims
    bench.happen(t.ClaimEnded(pool))
    assert not bench.state.members


def test_a_pool_may_stand_where_another_pin_of_the_same_may_not() -> None:
    bench = bench_with(A)
    pin(bench, A, unclaimed=False)
    assert only(bench.tick(), t.CannotLoad)
    pool = pin(bench, A, ANY_GPU)
    assert bench.tick() == [t.Place(pool, X), t.Load(X, ID[A.ref])]


def test_what_cannot_be_loaded_takes_no_place_of_a_pool_in_the_same_plan() -> None:
    bench = bench_with(D, G, A)
    bench.gpu(Y, 100)
    pin(bench, D)
    pin(bench, G, Y)
    bench.tick()
    stand(bench, D, 60)
    bench.tick()
    bench.loaded(G, Y)
    bench.gpu_has(Y, 30)
    pin(bench, G)
    pool = pin(bench, A, ANY_GPU)
    actions = bench.tick()
    assert {(a.device, a.artifact) for a in only(actions, t.CannotLoad)} == {(X, ID[G.ref])}
    assert placed(bench) == {X} and only(actions, t.Load) == [t.Load(X, ID[A.ref])]
    assert t.Place(pool, X) in actions


def test_a_copy_that_waits_its_turn_stays_in_line_whoever_comes_behind() -> None:
    bench = bench_with(A, D, G)
    bench.gpu(Y, 10)
    pin(bench, A)
    pool = pin(bench, D, ANY_GPU)
    assert t.Place(pool, X) in bench.tick()
    bench.gpu_has(Y, 60)
    pin(bench, G, EVERY_GPU)
    assert {a.device for a in only(bench.tick(), t.Place)} == {X, Y}  # type: ignore[union-attr]
    stand(bench, A, 70)
    assert bench.tick() == [t.Load(X, ID[D.ref])]


@pytest.mark.parametrize("device", [ANY_GPU, EVERY_GPU])
def test_a_pool_without_a_gpu_says_so_and_is_placed_when_one_comes(device: Device) -> None:
    bench = Bench(rules=RULES)
    bench.recover(A)
    pool = pin(bench, A, device)
    assert only(bench.tick(), t.CannotLoad)
    bench.gpu(X, 100)
    assert bench.tick() == [t.Place(pool, X), t.Load(X, ID[A.ref])]


def test_disk_is_what_it_was() -> None:
    bench = bench_with(A)
    lease = bench.claim(A, prefers=(X, HOST))
    assert bench.tick() == [t.Grant(lease, DISK)]
