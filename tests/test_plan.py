"""The planner's policies, one by one; what must hold whatever happens is in test_plan_machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from plan_bench import ID, A, B, Bench, C, D, E, F, G, held_claim, make_claim, only, the_refusal
from plan_world import (
    BYTES_OF,
    CHANGED,
    ORIGIN,
    PERMANENT,
    START,
    TEMPORARY,
    World,
    artifact_of,
    digest,
    make_revision,
    note_of,
)

from cached.model import (
    DISK,
    HOST,
    Artifact,
    ArtifactId,
    Aside,
    ClaimId,
    ClaimKind,
    Device,
    Digest,
    ErrorKind,
    Holder,
    Note,
    Problem,
    Ref,
    RevisionKey,
)
from cached.plan import access_problem, evict_problem, host_swap_problem, is_read_soon
from cached.plan import types as t
from cached.plan.apply import LAST_BACKOFF_S, ORIGIN_SETTLES_S, backoff_s
from cached.plan.decide import REFRESH_AFTER_S
from cached.plan.ledger import Ledger
from cached.plan.tick import MOST_ROUNDS, OUR_DEATHS
from cached.plan.words import ROOM_RETRY_S, STANDBY_WAIT_S


@pytest.mark.parametrize(
    ("device", "holder", "soon"),
    [(DISK, None, False), (HOST, None, True), (DISK, Holder(uid=1000, pid=7, host="web-1"), True)],
)
def test_what_a_replica_waits_for_or_a_device_is_read_soon(
    device: Device, holder: Holder | None, soon: bool
) -> None:
    bench = Bench()
    claim = make_claim("c", A, ClaimKind.LEASE, device, START, False, None)
    bench.happen(t.ClaimMade(replace(claim, holder=holder)), t.Resolved(A))
    bench.tick()
    assert is_read_soon(bench.state, A.key) is soon


# --- the way of one acquire -----------------------------------------------------------------


def test_a_cold_acquire_resolves_fetches_loads_and_is_granted() -> None:
    bench = Bench()
    bench.standby()
    lease = bench.claim(A, device=HOST)
    assert bench.tick() == [t.Resolve(A.ref)]
    bench.happen(t.Resolved(A))
    assert bench.tick() == [t.Fetch(A, background=False)]
    bench.fetched(A)
    assert bench.tick() == [t.Load(HOST, ID[A.ref])]
    bench.loaded(A)
    assert bench.tick() == [t.Grant(lease, HOST)]


def test_a_warm_acquire_uses_the_note_and_asks_no_origin() -> None:
    bench = Bench()
    bench.recover(A)
    lease = bench.claim(A)
    assert bench.tick() == [t.Grant(lease, DISK)]


def test_a_fresh_acquire_asks_the_origin_first() -> None:
    bench = Bench()
    bench.recover(A)
    lease = bench.claim(A, fresh=True)
    assert bench.tick() == [t.Resolve(A.ref)]
    bench.happen(t.Resolved(A))
    assert bench.tick() == [t.Grant(lease, DISK)]


def test_many_claims_cause_one_resolution_one_fetch_one_load() -> None:
    bench = Bench()
    bench.standby()
    leases = [bench.claim(A, device=HOST) for _ in range(100)]
    assert bench.tick() == [t.Resolve(A.ref)]
    bench.happen(t.Resolved(A))
    assert bench.tick() == [t.Fetch(A, background=False)]
    bench.fetched(A)
    assert bench.tick() == [t.Load(HOST, ID[A.ref])]
    bench.loaded(A)
    assert bench.tick() == [t.Grant(lease, HOST) for lease in leases]


def test_an_old_note_is_used_at_once_and_refreshed_behind_once() -> None:
    bench = Bench()
    bench.recover(A, old_s=REFRESH_AFTER_S)
    leases = [bench.claim(A), bench.claim(A)]
    assert bench.tick() == [t.Grant(leases[0], DISK), t.Refresh(A.ref), t.Grant(leases[1], DISK)]
    later = bench.claim(A)
    assert bench.tick() == [t.Grant(later, DISK)], "the note counts as new while it is refreshed"


def test_a_refresh_that_finds_a_newer_revision_changes_nothing_until_it_is_proven() -> None:
    bench = Bench()
    newer = make_revision("a", "bc")
    bench.recover(A)
    refresh = bench.claim(A, ClaimKind.PREFETCH, fresh=True)
    bench.tick()
    bench.happen(t.Resolved(newer))
    bench.tick()
    assert bench.tick() == [] and bench.state.notes[A.ref].revision == A.key
    lease = bench.claim(A)
    assert bench.tick() == [t.Grant(lease, DISK)]
    bench.fetched(newer)
    assert bench.tick() == [t.Grant(refresh, DISK)]
    assert bench.state.notes[A.ref].revision == newer.key


def test_a_pin_moves_to_the_newer_revision_once_that_is_proven() -> None:
    bench = Bench()
    newer = make_revision("a", "bc")
    pin = make_claim("pin", A, ClaimKind.PIN)
    bench.recover(A, claims=(pin,))
    bench.claim(A, ClaimKind.PREFETCH, fresh=True)
    bench.tick()
    bench.happen(t.Resolved(newer))
    bench.tick()
    assert bench.state.claims[pin.id].artifact == ID[A.ref]
    bench.fetched(newer)
    assert bench.state.claims[pin.id].artifact == artifact_of(newer).id


# --- order ----------------------------------------------------------------------------------


def test_waiters_come_before_prefetches() -> None:
    bench = Bench(fetch_slots=1)
    for revision, kind in ((A, ClaimKind.PREFETCH), (B, ClaimKind.LEASE)):
        bench.claim(revision, kind)
    bench.tick()
    bench.happen(t.Resolved(A), t.Resolved(B))
    assert bench.tick() == [t.Fetch(B, background=False)]


def test_a_waiter_preempts_the_newest_background_transfer_which_resumes() -> None:
    bench = Bench(fetch_slots=2)
    bench.fetching(A, ClaimKind.PREFETCH)
    bench.fetching(B, ClaimKind.PIN)
    bench.claim(C)
    bench.tick()
    bench.happen(t.Resolved(C))
    assert bench.tick() == [t.StopFetch(B.key)]
    bench.happen(t.FetchStopped(B.key))
    assert bench.tick() == [t.Fetch(C, background=False)]
    bench.fetched(C)
    assert t.Fetch(B, background=True) in bench.tick()


def test_a_waiter_joining_a_prefetch_hurries_it_until_he_leaves() -> None:
    bench = Bench(fetch_slots=2)
    bench.fetching(A, ClaimKind.PREFETCH)
    lease = bench.claim(A, fresh=True)
    assert bench.tick() == [t.Resolve(A.ref)]
    bench.happen(t.Resolved(A))
    assert bench.tick() == [t.Rank(A.key, background=False)]
    # Now it is no background transfer that another waiter could stop.
    bench.fetching(B, ClaimKind.LEASE)
    bench.claim(C)
    bench.tick()
    bench.happen(t.Resolved(C))
    assert bench.tick() == []
    bench.happen(t.ClaimEnded(lease))
    assert bench.tick() == [t.Rank(A.key, background=True), t.StopFetch(A.key)]
    bench.happen(t.FetchStopped(A.key))
    assert bench.tick() == [t.Fetch(C, background=False)]


def test_a_transfer_that_lost_its_last_claim_is_stopped_and_not_ranked() -> None:
    bench = Bench()
    lease = bench.fetching(A)
    bench.happen(t.ClaimEnded(lease))
    assert bench.tick() == [t.StopFetch(A.key)]


def test_a_waiter_does_not_preempt_another() -> None:
    bench = Bench(fetch_slots=1)
    bench.fetching(A)
    bench.claim(B)
    bench.tick()
    bench.happen(t.Resolved(B))
    assert bench.tick() == []


def test_a_transfer_that_nobody_claims_any_more_is_stopped_and_its_leftovers_serve_the_next() -> None:
    bench = Bench()
    lease = bench.fetching(A)
    bench.happen(t.ClaimEnded(lease))
    assert bench.tick() == [t.StopFetch(A.key)]
    bench.happen(t.FetchStopped(A.key))
    assert bench.tick() == []
    assert bench.state.disk.ledger.used_bytes == A.size_bytes, "leftovers count"
    bench.claim(A)
    bench.tick()
    bench.happen(t.Resolved(A))
    assert bench.tick() == [t.Fetch(A, background=False)]


# --- room on disk ---------------------------------------------------------------------------


def test_the_coldest_unclaimed_artifact_is_evicted_and_only_then_is_there_room() -> None:
    bench = Bench()
    bench.recover(A, B, E)  # 80 of 100 bytes, A the coldest
    bench.claim(D)
    bench.tick()
    bench.happen(t.Resolved(D))
    (evict,) = bench.tick()
    assert isinstance(evict, t.Evict) and evict.artifact == ID[A.ref] and evict.drop == (digest("a"),)
    assert bench.state.disk.ledger.used_bytes == 80, "it counts until it is gone"
    bench.happen(t.Evicted(ID[A.ref]))
    assert bench.tick() == [t.Fetch(D, background=False)]


def test_use_keeps_an_artifact_warm() -> None:
    bench = Bench()
    bench.recover(A, B, E)
    bench.happen(t.Used(ID[A.ref]))
    bench.claim(D)
    bench.tick()
    bench.happen(t.Resolved(D))
    (evict,) = bench.tick()
    assert isinstance(evict, t.Evict) and evict.artifact == ID[B.ref]


def test_a_shared_content_is_counted_once_and_not_dropped() -> None:
    bench = Bench()
    both = make_revision("both", "ac")
    bench.recover(A, both)
    assert bench.state.disk.ledger.used_bytes == 40
    bench.happen(t.EvictAsked(artifact_of(both).id))
    (evict,) = bench.tick()
    assert isinstance(evict, t.Evict) and evict.drop == (digest("c"),)


def test_leftovers_go_before_artifacts() -> None:
    bench = Bench()
    bench.happen(t.Recovered((artifact_of(A),), (note_of(A),), (), (B,)))
    bench.claim(make_revision("dc", "dce"))
    bench.tick()
    bench.happen(t.Resolved(make_revision("dc", "dce")))
    assert bench.tick() == [t.Discard(B.key, (digest("b"),))]


def test_a_victim_is_released_from_devices_first() -> None:
    bench = Bench()
    bench.recover(A, B, E)
    bench.standby(A)
    bench.claim(D)
    bench.tick()
    bench.happen(t.Resolved(D))
    (release,) = bench.tick()
    assert isinstance(release, t.Release) and (release.device, release.artifact) == (HOST, ID[A.ref])
    bench.happen(t.Released(HOST, ID[A.ref]))
    (evict,) = bench.tick()
    assert isinstance(evict, t.Evict) and evict.artifact == ID[A.ref]


def test_what_is_larger_than_the_disk_is_refused_for_good_with_the_arithmetic() -> None:
    bench = Bench()
    bench.claim(F, ClaimKind.PREFETCH)
    bench.tick()
    bench.happen(t.Resolved(F))
    problem = the_refusal(bench.tick())
    assert problem.kind is ErrorKind.NO_ROOM and not problem.temporary
    assert "needs 120 B on disk; the capacity is 100 B, of which 0 B are claimed" in problem.message
    assert "capacity_bytes" in problem.hint


def test_what_claims_leave_no_room_for_is_refused_for_now_and_claims_stay() -> None:
    bench = Bench()
    bench.recover(A, D, claims=(held_claim("lease", A), make_claim("pin", D, ClaimKind.PIN)))
    bench.claim(make_revision("be", "be"))
    bench.tick()
    bench.happen(t.Resolved(make_revision("be", "be")))
    actions = bench.tick()
    problem = the_refusal(actions)
    assert problem.retry_after_s == ROOM_RETRY_S
    assert "needs 50 B on disk; the capacity is 100 B, of which 70 B are claimed" in problem.message
    assert not only(actions, t.Evict)


def test_one_content_in_two_files_needs_its_bytes_once() -> None:
    bench = Bench(disk_bytes=60)
    twice = make_revision("dd", "dd")
    bench.recover(A, claims=(held_claim("lease", A),))
    bench.claim(twice)
    bench.tick()
    bench.happen(t.Resolved(twice))
    problem = the_refusal(bench.tick())
    assert problem.temporary and "needs 40 B" in problem.message


def test_room_held_by_a_transfer_that_nobody_wants_is_waited_for_not_refused() -> None:
    bench = Bench()
    idle = bench.fetching(G)
    bench.happen(t.ClaimEnded(idle))
    assert bench.tick() == [t.StopFetch(G.key)]
    bench.claim(D)
    bench.tick()
    bench.happen(t.Resolved(D))
    assert bench.tick() == []
    bench.happen(t.FetchStopped(G.key))
    assert bench.tick() == [t.Discard(G.key, (digest("g"),))]
    bench.happen(t.Discarded(G.key))
    assert bench.tick() == [t.Fetch(D, background=False)]


def test_the_third_of_three_waits_for_each_victim_in_turn() -> None:
    bench = Bench()
    bench.recover(A, B, C)  # 70 of 100 bytes
    bench.claim(G)
    bench.tick()
    bench.happen(t.Resolved(G))
    for victim in (A, B):
        (evict,) = bench.tick()
        assert isinstance(evict, t.Evict) and evict.artifact == ID[victim.ref]
        bench.happen(t.Evicted(ID[victim.ref]))
    assert bench.tick() == [t.Fetch(G, background=False)]


# --- what leaves by itself ------------------------------------------------------------------


def test_above_the_high_watermark_the_coldest_leave_until_the_low_one() -> None:
    bench = Bench(rules=t.Rules(high_watermark=0.9, low_watermark=0.5))
    bench.recover(A, B, C)
    assert bench.tick() == [], "70 of 100 bytes are not too many"
    bench.fetching(E, ClaimKind.PREFETCH)
    assert bench.tick() == [], "90 are not yet"
    bench.happen(t.CapacitySet(DISK, 99))
    for victim in (A, B):
        (evict,) = bench.tick()
        assert isinstance(evict, t.Evict) and evict.artifact == ID[victim.ref] and "high" in evict.why
        assert bench.tick() == [], "one at a time"
        bench.happen(t.Evicted(ID[victim.ref]))
    assert bench.state.disk.ledger.used_bytes == 30 and bench.tick() == []


def test_what_is_given_out_at_this_moment_is_not_the_coldest() -> None:
    bench = Bench(rules=t.Rules(high_watermark=0.9, low_watermark=0.5))
    bench.recover(A, B)
    bench.claim(A, ClaimKind.PREFETCH)  # it is here: granted, and over, in the plan that also makes room
    bench.happen(t.CapacitySet(DISK, 60))
    grant, evict = bench.tick()
    assert isinstance(grant, t.Grant)
    assert isinstance(evict, t.Evict) and evict.artifact == ID[B.ref]


def test_between_the_watermarks_nothing_leaves_and_a_start_does_not_forget_it() -> None:
    bench = Bench(rules=t.Rules(high_watermark=0.9, low_watermark=0.5))
    bench.recover(A, B, E)
    assert bench.state.disk.ledger.used_bytes == 80 and bench.tick() == []


def test_claims_that_are_more_than_the_disk_may_hold_stay_and_cause_nothing() -> None:
    bench = Bench()
    bench.recover(A, B, claims=(held_claim("lease", A), make_claim("pin", B, ClaimKind.PIN)))
    bench.happen(t.CapacitySet(DISK, 40))
    assert bench.tick() == [] and bench.state.disk.draining
    lease = bench.claim(A)
    assert bench.tick() == [t.Grant(lease, DISK)], "what is there is still given"
    bench.happen(t.ClaimEnded(ClaimId("pin")))
    (evict,) = bench.tick()
    assert isinstance(evict, t.Evict) and evict.artifact == ID[B.ref]


def test_a_pin_that_was_too_large_is_fetched_once_the_disk_has_grown() -> None:
    bench = Bench(disk_bytes=60)
    bench.claim(G, ClaimKind.PIN)
    bench.tick()
    bench.happen(t.Resolved(G))
    assert isinstance(bench.tick()[0], t.CannotFetch) and bench.tick() == []
    bench.happen(t.CapacitySet(DISK, 100))
    assert bench.tick() == [t.Fetch(G, background=True)]


def test_quarantined_content_counts_and_leaves_by_age() -> None:
    bench = Bench()
    bench.recover(A)
    bench.happen(t.Corrupt(digest("a"), "bad"))
    bench.tick()
    bench.happen(t.Quarantined((ID[A.ref],), (), Aside("a.1", 30, bench.now)))
    assert bench.state.disk.ledger.used_bytes == 30
    bench.now += bench.state.rules.quarantine_keep_s - 1
    assert bench.tick() == []
    bench.now += 1
    (purge,) = bench.tick()
    assert isinstance(purge, t.Purge) and purge.aside == "a.1"
    bench.happen(t.Purged("a.1"))
    assert bench.state.disk.ledger.used_bytes == 0 and bench.tick() == []


def test_quarantined_content_makes_room_before_anything_else_the_oldest_first() -> None:
    bench = Bench()
    asides = (Aside("new.2", 20, START), Aside("old.1", 10, START - 50))
    bench.happen(t.Recovered((artifact_of(A),), (note_of(A),), (), (B,), asides))
    bench.claim(G)
    bench.tick()
    bench.happen(t.Resolved(G))
    for name in ("old.1", "new.2"):
        (purge,) = bench.tick()
        assert isinstance(purge, t.Purge) and purge.aside == name
        bench.happen(t.Purged(name))
    assert bench.tick() == [t.Discard(B.key, (digest("b"),))]
    bench.happen(t.Discarded(B.key))
    assert bench.tick() == [t.Fetch(G, background=False)]


def test_leftovers_leave_by_age_counted_from_when_they_last_grew() -> None:
    bench = Bench()
    keep_s = bench.state.rules.leftovers_keep_s
    bench.happen(t.Recovered((), (), (), (A, B), ran_at={A.key: START - keep_s + 10}))
    assert bench.tick() == []
    bench.now += 10
    assert bench.tick() == [t.Discard(A.key, (digest("a"),))]
    bench.happen(t.Discarded(A.key))
    lease = bench.fetching(B)
    bench.now += 2 * keep_s
    bench.happen(t.ClaimEnded(lease))
    assert bench.tick() == [t.StopFetch(B.key)]
    bench.happen(t.FetchStopped(B.key))
    assert bench.tick() == [], "it ran a moment ago"
    bench.now += keep_s
    assert bench.tick() == [t.Discard(B.key, (digest("b"),))]


# --- which one leaves -----------------------------------------------------------------------

GB = 10**9
MODELS = {name: f"{number:064x}" for number, name in enumerate("abcdefghij")}


def idle_model(name: str, size_bytes: int, idle_s: float, shared: str = "") -> Artifact:
    blobs = [(Digest(MODELS[name]), size_bytes)] + ([(Digest(MODELS[shared]), 9 * GB)] if shared else [])
    return Artifact(ArtifactId(f"sha256:{MODELS[name]}"), tuple(blobs), START - idle_s)


def leaves_first(*models: Artifact, rates: Mapping[str, float] | None = None) -> str:
    """The name of the one that makes room first."""
    bench = Bench(disk_bytes=sum(m.size_bytes for m in models))
    keys = {m.id: RevisionKey(m.id.removeprefix("sha256:")) for m in models}
    known = {ArtifactId(f"sha256:{MODELS[name]}"): rate for name, rate in (rates or {}).items()}
    notes = [
        Note(Ref(m.id), keys[m.id], m.id, True, START, rate_bytes_per_s=known.get(m.id, 0.0)) for m in models
    ]
    bench.happen(t.Recovered(models, tuple(notes), (), ()))
    bench.happen(t.CapacitySet(DISK, bench.state.disk.ledger.used_bytes - 1))
    (evict,) = bench.tick()
    assert isinstance(evict, t.Evict)
    return next(name for name, d in MODELS.items() if evict.artifact.endswith(d))


def test_of_large_models_the_coldest_leaves_first_whatever_their_size() -> None:
    assert leaves_first(idle_model("a", 40 * GB, 100), idle_model("b", 4 * GB, 110)) == "b"


def test_one_large_model_leaves_before_many_small_ones_that_are_nearly_as_cold() -> None:
    small = [idle_model(name, GB // 100, 120) for name in "bcdefghij"]
    assert leaves_first(*small, idle_model("a", 10 * GB, 100)) == "a"
    assert leaves_first(*small, idle_model("a", 10 * GB, 1)) == "b", "much colder ones do"


def test_what_is_slow_to_have_again_stays_longer() -> None:
    models = idle_model("a", 10 * GB, 200), idle_model("b", 10 * GB, 100)
    assert leaves_first(*models) == "a"
    assert leaves_first(*models, rates={"a": 10e6, "b": 100e6}) == "b"
    assert leaves_first(*models, rates={"a": 100e6, "b": 100e6}) == "a"


def test_what_others_share_does_not_count_as_freed() -> None:
    pair = idle_model("a", GB // 100, 300, "j"), idle_model("b", GB // 100, 300, "j")
    assert leaves_first(*pair, idle_model("c", 9 * GB, 100)) == "c"


def test_models_that_share_all_they_have_leave_too() -> None:
    twin = Artifact(ArtifactId("sha256:" + "f" * 64), idle_model("a", GB, 300).blobs, START - 10)
    assert leaves_first(idle_model("a", GB, 300), twin) == "a"


def test_what_a_claim_shares_is_not_taken_down_for_nothing() -> None:
    bench = Bench()
    twin = Artifact(ArtifactId("sha256:" + "f" * 64), artifact_of(A).blobs, START - 500)
    note = Note(Ref("twin"), RevisionKey("f" * 64), twin.id, True, START)
    pin = make_claim("pin", A, ClaimKind.PIN)
    bench.happen(t.Recovered((artifact_of(A), twin), (note_of(A), note), (pin,), ()))
    bench.happen(t.CapacitySet(DISK, 20))
    assert bench.tick() == []


def test_a_lease_keeps_its_model_warm_until_it_ends() -> None:
    bench = Bench()
    bench.recover(A, B, claims=(held_claim("lease", A),))
    bench.now += 1000
    bench.happen(t.ClaimEnded(ClaimId("lease")), t.CapacitySet(DISK, 50))
    (evict,) = bench.tick()
    assert isinstance(evict, t.Evict) and evict.artifact == ID[B.ref]


def test_a_measured_rate_outlives_a_resolution_that_finds_the_same() -> None:
    bench = Bench()
    note = replace(note_of(A), rate_bytes_per_s=5e6)
    bench.happen(t.Recovered((artifact_of(A),), (note,), (), ()))
    bench.claim(A, fresh=True)
    bench.tick()
    bench.happen(t.Resolved(A))
    assert bench.state.notes[A.ref].rate_bytes_per_s == 5e6


# --- failures -------------------------------------------------------------------------------


def test_backoff_doubles_up_to_its_bound() -> None:
    assert [backoff_s(n) for n in (1, 2, 3, 4)] == [1.0, 2.0, 4.0, 8.0]
    assert backoff_s(1000) == LAST_BACKOFF_S


def test_a_lease_is_told_at_once_even_of_what_may_pass() -> None:
    bench = Bench()
    lease = bench.fetching(A)
    bench.happen(t.FetchFailed(A.key, TEMPORARY))
    assert bench.tick() == [t.Refuse(lease, TEMPORARY)]
    assert not bench.state.claims


@pytest.mark.parametrize("reason", sorted(OUR_DEATHS))
def test_a_lease_does_not_hear_of_a_death_of_our_own_until_it_was_too_many(reason: str) -> None:
    bench = Bench()
    lease = bench.fetching(A)
    problem = Problem(ErrorKind.UNAVAILABLE, reason, "it died", "it is tried again", 1.0)
    for rounds in range(1, MOST_ROUNDS):
        bench.happen(t.FetchFailed(A.key, problem))
        assert bench.tick() == []
        bench.now += backoff_s(rounds)
        assert bench.tick() == [t.Fetch(A, background=False)]
    bench.happen(t.FetchFailed(A.key, problem))
    assert bench.tick() == [t.Refuse(lease, problem)]


def test_a_failed_transfer_is_tried_again_after_its_backoff() -> None:
    bench = Bench()
    bench.fetching(A, ClaimKind.PIN)
    for rounds in (1, 2, 3):
        bench.happen(t.FetchFailed(A.key, TEMPORARY))
        bench.now += backoff_s(rounds) - 0.1
        assert bench.tick() == []
        bench.now += 0.1
        assert bench.tick() == [t.Fetch(A, background=True)]


def test_the_origin_may_ask_for_more_time_than_the_backoff() -> None:
    bench = Bench()
    bench.fetching(A, ClaimKind.PIN)
    bench.happen(t.FetchFailed(A.key, Problem(ErrorKind.UNAVAILABLE, "BUSY", "busy", "wait", 60.0)))
    bench.now += 59.0
    assert bench.tick() == []
    bench.now += 1.0
    assert bench.tick() == [t.Fetch(A, background=True)]


@pytest.mark.parametrize("kind", [ClaimKind.PREFETCH, ClaimKind.PIN])
def test_a_prefetch_is_given_up_after_most_rounds_and_a_pin_never(kind: ClaimKind) -> None:
    bench = Bench()
    claim = bench.fetching(A, kind)
    for _ in range(MOST_ROUNDS - 1):
        bench.happen(t.FetchFailed(A.key, TEMPORARY))
        bench.now += LAST_BACKOFF_S
        assert bench.tick() == [t.Fetch(A, background=True)]
    bench.happen(t.FetchFailed(A.key, TEMPORARY))
    assert bench.tick() == ([t.Refuse(claim, TEMPORARY)] if kind is ClaimKind.PREFETCH else [])
    bench.now += LAST_BACKOFF_S
    assert bench.tick() == ([] if kind is ClaimKind.PREFETCH else [t.Fetch(A, background=True)])


def test_a_permanent_failure_ends_a_prefetch_and_rests_a_pin_until_somebody_asks_again() -> None:
    bench = Bench()
    prefetch = bench.claim(A, ClaimKind.PREFETCH)
    bench.claim(A, ClaimKind.PIN)
    bench.tick()
    bench.happen(t.ResolveFailed(A.ref, PERMANENT))
    assert bench.tick() == [t.Refuse(prefetch, PERMANENT)]
    bench.now += LAST_BACKOFF_S
    assert bench.tick() == []
    bench.claim(A)
    assert bench.tick() == [t.Resolve(A.ref)]


def test_failed_loads_back_off_and_a_new_claim_tries_at_once() -> None:
    bench = Bench()
    bench.recover(A, claims=(make_claim("pin", A, ClaimKind.PIN, HOST),))
    bench.standby()
    assert bench.tick() == [t.Load(HOST, ID[A.ref])]
    bench.happen(t.LoadFailed(HOST, ID[A.ref], TEMPORARY))
    assert bench.tick() == []
    bench.claim(A, device=HOST)
    assert bench.tick() == [t.Load(HOST, ID[A.ref])]


def test_a_fresh_lease_is_not_told_of_an_older_failure_to_load() -> None:
    bench = Bench()
    bench.recover(A, claims=(make_claim("pin", A, ClaimKind.PIN, HOST),))
    bench.standby()
    bench.tick()
    bench.happen(t.LoadFailed(HOST, ID[A.ref], PERMANENT))
    bench.claim(A, device=HOST, fresh=True)
    assert bench.tick() == [t.Resolve(A.ref)]
    bench.happen(t.Resolved(A))
    assert bench.tick() == [t.Load(HOST, ID[A.ref])]


def test_a_pin_whose_origin_changed_midway_asks_it_again() -> None:
    bench = Bench()
    newer = make_revision("a", "bc")
    bench.fetching(A, ClaimKind.PIN)
    bench.happen(t.FetchFailed(A.key, CHANGED))
    assert bench.tick() == []
    bench.now += ORIGIN_SETTLES_S
    assert bench.tick() == [t.Resolve(A.ref)]
    bench.happen(t.Resolved(newer))
    assert bench.tick() == [t.Fetch(newer, background=True)]


def test_a_lease_that_waits_to_be_resolved_is_not_told_of_a_change_that_it_never_met() -> None:
    bench = Bench()
    bench.state.resolve_slots = 1
    bench.fetching(A, ClaimKind.PIN)
    bench.claim(B)
    assert bench.tick() == [t.Resolve(B.ref)]
    bench.claim(A)
    assert bench.tick() == []
    bench.happen(t.FetchFailed(A.key, CHANGED))
    assert bench.tick() == []
    bench.happen(t.Resolved(B))
    assert t.Resolve(A.ref) in bench.tick()


# --- devices --------------------------------------------------------------------------------


def test_the_coldest_idle_resident_makes_room_for_a_load() -> None:
    bench = Bench()
    bench.recover(A, B, D)
    bench.standby(A, B)
    bench.claim(D, device=HOST)
    (release,) = bench.tick()
    assert isinstance(release, t.Release) and release.artifact == ID[A.ref]
    bench.happen(t.Released(HOST, ID[A.ref]))
    (release,) = bench.tick()
    assert isinstance(release, t.Release) and release.artifact == ID[B.ref]
    bench.happen(t.Released(HOST, ID[B.ref]))
    assert bench.tick() == [t.Load(HOST, ID[D.ref])]


def test_a_claimed_resident_is_not_released_and_the_refusal_has_the_arithmetic() -> None:
    bench = Bench()
    bench.recover(A, D, claims=(held_claim("lease", A, HOST),))
    bench.standby(A)
    bench.claim(D, device=HOST)
    problem = the_refusal(bench.tick())
    assert problem.reason == "DEVICE_CAPACITY" and problem.retry_after_s == ROOM_RETRY_S
    assert "needs 40 B on host; the capacity is 60 B, of which 30 B are claimed" in problem.message


def test_what_is_larger_than_memory_is_refused_for_good_and_does_not_block_the_next() -> None:
    bench = Bench()
    bench.recover(G, A)
    bench.standby()
    bench.claim(G, device=HOST)
    bench.claim(A, device=HOST)
    actions = bench.tick()
    assert not the_refusal(actions).temporary
    assert only(actions, t.Load) == [t.Load(HOST, ID[A.ref])]


def test_a_lease_waits_so_long_for_a_standby_and_a_pin_for_ever() -> None:
    bench = Bench()
    bench.recover(A, claims=(make_claim("pin", A, ClaimKind.PIN, HOST),))
    bench.claim(A, device=HOST)
    bench.now += STANDBY_WAIT_S - 0.1
    assert bench.tick() == []
    bench.now += 0.1
    assert the_refusal(bench.tick()).reason == "NO_STANDBY"
    bench.claim(A, device=HOST)
    assert the_refusal(bench.tick()).reason == "NO_STANDBY", "none was seen for as long already"
    bench.standby()
    assert bench.tick() == [t.Load(HOST, ID[A.ref])]


def test_a_swap_on_the_host_that_cannot_be_is_known_before() -> None:
    bench = Bench()
    bench.recover(A, B, G)
    assert host_swap_problem(bench.state, None, ID[A.ref]).reason == "NO_STANDBY"  # type: ignore[union-attr]
    bench.standby(A, B, capacity_bytes=A.size_bytes + B.size_bytes)
    for revision in (A, B):
        bench.claim(revision, ClaimKind.PIN, HOST)
    assert host_swap_problem(bench.state, ID[A.ref], ID[B.ref]) is None, "it stands there"
    told = host_swap_problem(bench.state, ID[A.ref], ID[G.ref])
    assert told is not None and told.reason == "DEVICE_CAPACITY"
    bench.state.places[HOST].capacity_bytes = B.size_bytes + G.size_bytes
    assert host_swap_problem(bench.state, ID[A.ref], ID[G.ref]) is None
    bench.claim(A, device=HOST)
    bench.tick()
    assert host_swap_problem(bench.state, ID[A.ref], ID[G.ref]), "it is leased, and leaves for nobody"


def test_a_standby_that_was_just_lost_is_waited_for_anew() -> None:
    bench = Bench()
    bench.recover(A)
    bench.standby()
    bench.claim(A, device=HOST)
    bench.tick()
    bench.now += 100.0
    bench.happen(t.StandbyGone(HOST))
    bench.now += STANDBY_WAIT_S - 0.1
    assert bench.tick() == []
    bench.standby()
    assert bench.tick() == [t.Load(HOST, ID[A.ref])]


def test_what_a_standby_still_holds_is_not_loaded_again() -> None:
    bench = Bench()
    bench.recover(A, claims=(held_claim("lease", A, HOST),))
    bench.standby(A)
    lease = bench.claim(A, device=HOST)
    assert bench.tick() == [t.Grant(lease, HOST)]


def test_a_standby_that_tells_again_does_not_disturb_what_is_under_way() -> None:
    bench = Bench()
    bench.recover(A, B, D)
    bench.standby(A, B)
    bench.claim(D, device=HOST)
    assert len(bench.tick()) == 1  # A is being released
    bench.standby(A, B)
    assert bench.tick() == []
    bench.standby(B)
    assert bench.tick() == []
    bench.happen(t.Released(HOST, ID[A.ref]))
    (release,) = bench.tick()
    assert isinstance(release, t.Release) and release.artifact == ID[B.ref]
    bench.happen(t.Released(HOST, ID[B.ref]))
    assert bench.tick() == [t.Load(HOST, ID[D.ref])]
    bench.standby()
    assert bench.tick() == []


def test_an_answer_that_comes_after_its_standby_went_changes_nothing() -> None:
    bench = Bench()
    bench.recover(A, claims=(held_claim("lease", A, HOST),))
    bench.standby()
    assert bench.tick() == [t.Load(HOST, ID[A.ref])]
    bench.happen(t.StandbyGone(HOST))
    bench.standby(A)
    bench.happen(t.LoadFailed(HOST, ID[A.ref], TEMPORARY), t.Released(HOST, ID[A.ref]))
    assert bench.state.is_resident(HOST, ID[A.ref]) and bench.tick() == []


def test_residents_that_are_not_on_disk_are_released() -> None:
    bench = Bench()
    bench.recover(A)
    bench.standby(A, B)
    (release,) = bench.tick()
    assert isinstance(release, t.Release) and release.artifact == ID[B.ref]


# --- operators ------------------------------------------------------------------------------


def test_an_eviction_that_was_asked_for_releases_then_evicts() -> None:
    bench = Bench()
    bench.recover(A)
    bench.standby(A)
    assert evict_problem(bench.state, ID[A.ref]) is None
    bench.happen(t.EvictAsked(ID[A.ref]))
    assert only(bench.tick(), t.Release)
    bench.happen(t.Released(HOST, ID[A.ref]))
    assert only(bench.tick(), t.Evict)


def test_a_claim_that_comes_in_between_saves_the_artifact() -> None:
    bench = Bench()
    bench.recover(A)
    bench.standby(A)
    bench.happen(t.EvictAsked(ID[A.ref]))
    bench.tick()
    lease = bench.claim(A)
    bench.happen(t.Released(HOST, ID[A.ref]))
    assert bench.tick() == [t.Grant(lease, DISK)]
    bench.happen(t.ClaimEnded(lease))
    assert bench.tick() == []


def test_a_claimed_artifact_is_not_evicted_and_its_holders_are_named() -> None:
    bench = Bench()
    bench.recover(A, claims=(held_claim("lease", A, HOST),))
    problem = evict_problem(bench.state, ID[A.ref])
    assert problem is not None
    assert "a lease on host of uid 1000 (declares pid 7 on web-1)" in problem.message
    bench.happen(t.EvictAsked(ID[A.ref]))
    assert bench.tick() == []


def test_a_second_eviction_waits_for_the_first() -> None:
    bench = Bench()
    bench.recover(A, B)
    bench.happen(t.EvictAsked(ID[A.ref]), t.EvictAsked(ID[B.ref]))
    assert len(bench.tick()) == 1
    bench.happen(t.Evicted(ID[A.ref]))
    (evict,) = bench.tick()
    assert isinstance(evict, t.Evict) and evict.artifact == ID[B.ref]


# --- time -----------------------------------------------------------------------------------


def test_a_ttl_lease_ends_unless_it_is_renewed() -> None:
    bench = Bench()
    bench.recover(A)
    lease = bench.claim(A, expires_at=START + 10)
    assert bench.tick() == [t.Grant(lease, DISK)]
    bench.happen(t.Renewed(lease, START + 20))
    bench.now += 10
    assert bench.tick() == []
    bench.now += 10
    assert bench.tick() == [t.Expire(lease)]
    assert not bench.state.claims and not bench.state.claimed


def test_a_lease_that_expires_before_its_fetch_begins_fetches_nothing() -> None:
    bench = Bench()
    lease = bench.claim(A, expires_at=START + 10)
    bench.tick()
    bench.happen(t.Resolved(A))
    bench.now += 10
    assert bench.tick() == [t.Expire(lease)]


# --- corruption -----------------------------------------------------------------------------


def test_corrupt_content_is_withdrawn_at_once_and_fetched_anew() -> None:
    bench = Bench()
    both = make_revision("both", "ac")
    pin = make_claim("pin", A, ClaimKind.PIN, HOST)
    bench.recover(A, both, B, claims=(pin, held_claim("lease", A, HOST)))
    bench.standby(A)
    lease = bench.claim(A)
    bench.happen(t.Corrupt(digest("a"), "bad bytes in a"))
    actions = bench.tick()
    assert set(actions[0].artifacts) == {ID[A.ref], artifact_of(both).id}  # type: ignore[union-attr]
    assert only(actions, t.Release) and not only(actions, t.Grant)
    assert set(bench.state.notes) == {B.ref}
    assert bench.state.withdrawn[A.ref].message == "bad bytes in a"
    bench.happen(t.Quarantined((ID[A.ref], artifact_of(both).id), (A,)), t.Released(HOST, ID[A.ref]))
    assert bench.tick() == [t.Resolve(A.ref)]
    bench.happen(t.Resolved(A))
    assert bench.tick() == [t.Fetch(A, background=False)]
    bench.fetched(A)
    assert A.ref not in bench.state.withdrawn
    assert bench.tick() == [t.Grant(lease, DISK), t.Load(HOST, ID[A.ref])]


def test_a_replica_that_runs_on_corrupt_content_keeps_its_lease_and_causes_no_fetch() -> None:
    bench = Bench()
    lease = held_claim("lease", A, HOST)
    bench.recover(A, claims=(lease,))
    bench.standby(A)
    bench.happen(t.Corrupt(digest("a"), "bad"))
    bench.tick()
    bench.happen(t.Quarantined((ID[A.ref],), ()), t.Released(HOST, ID[A.ref]))
    assert bench.tick() == []
    assert bench.state.claims == {lease.id: lease}


def test_what_is_committed_just_before_a_quarantine_takes_it_along_is_fetched_again() -> None:
    bench = Bench()
    both = make_revision("both", "ac")
    bench.recover(A)
    lease = bench.fetching(both)
    bench.happen(t.Corrupt(digest("a"), "bad"))
    bench.tick()
    bench.fetched(both)
    assert bench.tick() == [t.Grant(lease, DISK)]
    bench.claim(both, ClaimKind.PIN)
    bench.happen(t.Quarantined((ID[A.ref], artifact_of(both).id), ()))
    assert bench.state.disk.ledger.used_bytes == 0
    assert bench.tick() == [t.Resolve(both.ref)]


def test_a_pin_whose_load_found_the_corruption_is_loaded_again_after_the_new_fetch() -> None:
    bench = Bench()
    bench.recover(A, claims=(make_claim("pin", A, ClaimKind.PIN, HOST),))
    bench.standby()
    bench.tick()
    bench.happen(t.Corrupt(digest("a"), "bad"), t.LoadFailed(HOST, ID[A.ref], PERMANENT))
    bench.tick()
    bench.happen(t.Quarantined((ID[A.ref],), ()))
    bench.tick()
    bench.happen(t.Resolved(A))
    bench.tick()
    bench.fetched(A)
    assert bench.tick() == [t.Load(HOST, ID[A.ref])]


# --- restart --------------------------------------------------------------------------------


def test_a_restart_restores_what_pins_ask_for_without_asking_the_origin() -> None:
    bench = Bench()
    bench.recover(A, claims=(make_claim("pin", A, ClaimKind.PIN, HOST, fresh=True),))
    bench.standby()
    assert bench.tick() == [t.Load(HOST, ID[A.ref])]


def test_a_restart_resumes_leftovers_of_a_pin() -> None:
    bench = Bench()
    bench.happen(t.Recovered((), (), (make_claim("pin", A, ClaimKind.PIN),), (A,)))
    assert bench.state.disk.ledger.used_bytes == A.size_bytes
    assert bench.tick() == [t.Resolve(A.ref)]
    bench.happen(t.Resolved(A))
    assert bench.tick() == [t.Fetch(A, background=True)]
    assert bench.state.disk.ledger.used_bytes == A.size_bytes


def test_a_restart_keeps_leases_on_what_they_were_answered_with() -> None:
    bench = Bench()
    newer = make_revision("a", "bc")
    old = artifact_of(A)
    note = Note(A.ref, newer.key, artifact_of(newer).id, True, START)
    bench.happen(t.Recovered((old, artifact_of(newer)), (note,), (held_claim("lease", A),), ()))
    assert bench.tick() == []
    assert evict_problem(bench.state, old.id) is not None
    assert evict_problem(bench.state, artifact_of(newer).id) is None


def test_a_prefetch_that_a_crash_interrupted_goes_on() -> None:
    bench = Bench()
    bench.recover(B, claims=(make_claim("p", A, ClaimKind.PREFETCH), make_claim("q", B, ClaimKind.PREFETCH)))
    assert bench.tick() == [t.Grant(ClaimId("q"), DISK), t.Resolve(A.ref)]


# --- the simulated node ---------------------------------------------------------------------


def test_the_simulated_node_meets_a_claim_in_calm() -> None:
    """The machine's world is fair: without faults, everything that fits is met."""
    world = World()
    for ref in (Ref("a"), Ref("ec")):
        world.claim(ClaimKind.PIN, ref, HOST)
    lease = world.claim(ClaimKind.LEASE, Ref("dd"), DISK)
    world.calm_down()
    world.check_met()
    assert lease in world.granted and not world.refused
    assert world.memory[HOST] == {artifact_of(ORIGIN[Ref(ref)][0]).id for ref in ("a", "ec")}
    assert sum(BYTES_OF[d] for d in world.blobs) == 100


@pytest.mark.parametrize(
    ("here", "attested", "fresh", "only_here", "digest", "reason"),
    [
        (False, True, False, True, False, "OPERATORS_ONLY"),
        (True, True, True, True, False, "OPERATORS_ONLY"),
        (True, True, False, True, False, None),
        (False, True, False, False, True, None),
        (True, False, False, False, True, "NOT_ATTESTED"),
        (True, False, True, False, True, None),
        (True, False, False, False, False, None),
    ],
)
def test_who_may_have_what(
    here: bool, attested: bool, fresh: bool, only_here: bool, digest: bool, reason: str | None
) -> None:
    bench = Bench()
    if here:
        note = replace(note_of(A, START), attested=attested)
        bench.happen(t.Recovered((artifact_of(A),), (note,), (), ()))
    problem = access_problem(bench.state, A.ref, fresh, t.Access("a", only_here, digest))
    assert (problem.reason if problem else None) == reason


def test_a_content_that_is_listed_with_another_size_is_counted_besides() -> None:
    """Else an origin that lies about the size of what is here would be given room that there is not."""
    ledger = Ledger()
    ledger.add([("a", 10), ("b", 5)])
    draft = ledger.draft()
    assert draft.missing_bytes([("a", 10), ("a", 1000)]) == 1000
    draft.add([("a", 1000)])
    assert draft.used_bytes == 1015 and ledger.used_bytes == 15
    # Giving the lie up must not drop the content that others have.
    assert draft.only_in([("a", 1000)]) == () and draft.only_in([("b", 5)]) == ("b",)
    draft.remove([("a", 1000)])
    assert draft.used_bytes == 15 and draft.only_in([("a", 10)]) == ("a",)
    draft.remove([("a", 10)])
    assert draft.missing_bytes([("a", 10)]) == 10 and ledger.missing_bytes([("a", 10)]) == 0
