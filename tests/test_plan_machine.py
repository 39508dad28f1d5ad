"""The planner in a simulated node where anything may happen in any order; plan_world says what must hold."""

from __future__ import annotations

import os
from dataclasses import replace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from plan_gpu_world import GpuWorld, X, Y
from plan_world import ONLY_FULL, ORIGIN, REFS, RULES, World

from cached.model import ANY_GPU, DISK, EVERY_GPU, HOST, ClaimKind, Device, Ref, Room
from cached.plan import types as t

EXAMPLES = os.environ.get("PLAN_EXAMPLES")
"""How many examples to try when hunting by hand; unset, a fixed set is run."""

indices = st.integers(0, 15)
often = st.sampled_from([True, True, True, False])
outcomes = st.sampled_from(["ok", "ok", "ok", "temporary", "permanent"])


class Machine(RuleBasedStateMachine):
    """Rules are what can happen to a node. Usually a tick follows each; after ``pause``, only in the end."""

    make_world: type[World] = World

    def __init__(self) -> None:
        super().__init__()
        self.world = self.make_world()
        self.paused = 0

    def then(self) -> None:
        self.paused = max(0, self.paused - 1)
        self.world.check()
        if not self.paused:
            self.world.tick()

    @rule(events=st.integers(2, 4))
    def pause(self, events: int) -> None:
        """The next few events come within one tick."""
        self.paused = events

    @precondition(lambda self: self.world.state.claims)
    @rule(index=indices)
    def end_claim(self, index: int) -> None:
        claims = list(self.world.state.claims)
        self.world.happen(t.ClaimEnded(claims[index % len(claims)]))
        self.then()

    @precondition(lambda self: self.world.works)
    @rule(index=indices, outcome=outcomes)
    def finish(self, index: int, outcome: str) -> None:
        self.world.finish(index, outcome)
        self.then()

    @precondition(lambda self: self.world.works)
    @rule()
    def finish_all(self) -> None:
        for _ in range(40):
            if not self.world.works:
                break
            self.world.finish(0, "ok")
            self.world.tick()
        self.then()

    @rule(seconds=st.sampled_from([0.01, 1.0, 16.0, 60.0, 301.0, 1200.0]))
    def pass_time(self, seconds: float) -> None:
        self.world.tick()
        self.world.now += seconds
        self.then()

    @rule(connected=often)
    def restart(self, connected: bool) -> None:
        self.world.restart()
        if connected:
            self.world.connect()
        self.then()

    def teardown(self) -> None:
        self.world.tick()
        self.world.calm_down()
        self.world.check_met()


class Node(Machine):
    """A node whose disk and host memory are short."""

    @initialize(
        keep_leftovers=st.booleans(),
        connected=often,
        furniture=st.lists(st.sampled_from(REFS), max_size=4, unique=True),
        guests=st.integers(0, 3),
        rules=st.sampled_from([RULES, ONLY_FULL]),
    )
    def begin(
        self, keep_leftovers: bool, connected: bool, furniture: list[Ref], guests: int, rules: t.Rules
    ) -> None:
        """A node that has run for a while: artifacts on disk, and some of them held in memory."""
        self.world.keep_leftovers = keep_leftovers
        self.world.rules = replace(rules, gpu_reserve_bytes=self.world.rules.gpu_reserve_bytes)
        self.world.furnish(furniture)
        if connected:
            self.world.connect()
        for ref in furniture[:guests]:
            self.world.claim(ClaimKind.LEASE, ref, HOST)
        self.finish_all()

    # --- claims -----------------------------------------------------------------------------

    @rule(
        kind=st.sampled_from(ClaimKind),
        ref=st.sampled_from(REFS),
        device=st.sampled_from([DISK, HOST, HOST]),
        fresh=st.sampled_from([False, False, True]),
        ttl_s=st.none() | st.sampled_from([0.5, 30.0, 500.0]),
    )
    def claim(self, kind: ClaimKind, ref: Ref, device: Device, fresh: bool, ttl_s: float | None) -> None:
        ttl_s = ttl_s if kind is ClaimKind.LEASE else None
        self.world.claim(kind, ref, device, fresh, ttl_s)
        self.then()

    @precondition(lambda self: self.world.state.timed)
    @rule(index=indices)
    def renew(self, index: int) -> None:
        claims = list(self.world.state.timed)
        self.world.happen(t.Renewed(claims[index % len(claims)], self.world.now + 100.0))
        self.then()

    # --- works ------------------------------------------------------------------------------

    @rule(ref=st.sampled_from([ref for ref, versions in ORIGIN.items() if len(versions) > 1]))
    def origin_changes(self, ref: Ref) -> None:
        self.world.version[ref] += 1

    # --- memory -----------------------------------------------------------------------------

    @rule(ahead=st.booleans())
    def standby_tells(self, ahead: bool) -> None:
        self.world.see_standby(ahead)
        self.then()

    @precondition(lambda self: HOST in self.world.connected)
    @rule(died=st.booleans(), late=st.booleans())
    def standby_goes(self, died: bool, late: bool) -> None:
        self.world.lose_standby(died, late)
        self.then()

    @rule(capacity_bytes=st.sampled_from([30, 70, 100, 100]))
    def resize(self, capacity_bytes: int) -> None:
        self.world.resize(capacity_bytes)
        self.then()

    # --- the rest ---------------------------------------------------------------------------

    @precondition(lambda self: self.world.state.artifacts)
    @rule(index=indices, content=indices)
    def rot(self, index: int, content: int) -> None:
        artifacts = [
            a for a in self.world.state.artifacts.values() if self.world.state.is_verified(a.artifact.id)
        ]
        if artifacts:
            blobs = artifacts[index % len(artifacts)].artifact.blobs
            self.world.rot(blobs[content % len(blobs)][0])
        self.then()

    @precondition(lambda self: self.world.state.artifacts)
    @rule(index=indices)
    def ask_evict(self, index: int) -> None:
        artifacts = list(self.world.state.artifacts)
        self.world.ask_evict(artifacts[index % len(artifacts)])
        self.then()

    @precondition(lambda self: self.world.state.artifacts)
    @rule(index=indices)
    def use(self, index: int) -> None:
        artifacts = list(self.world.state.artifacts)
        self.world.happen(t.Used(artifacts[index % len(artifacts)]))
        self.then()


class GpuNode(Machine):
    """A node with GPUs, whose disk has room."""

    make_world = GpuWorld
    world: GpuWorld

    @initialize(pins=st.lists(st.tuples(st.sampled_from(REFS), st.sampled_from([X, Y, ANY_GPU])), max_size=3))
    def begin(self, pins: list[tuple[Ref, Device]]) -> None:
        self.world.furnish(REFS)
        self.world.connect()
        for ref, device in pins:
            self.world.claim(ClaimKind.PIN, ref, device, unclaimed=True)
        self.finish_all()

    @rule(
        kind=st.sampled_from(
            [ClaimKind.PIN, ClaimKind.PIN, ClaimKind.LEASE, ClaimKind.LEASE, ClaimKind.PREFETCH]
        ),
        ref=st.sampled_from(REFS),
        device=st.sampled_from([X, X, Y, ANY_GPU, EVERY_GPU]),
        copies=st.integers(1, 3),
        priority=st.integers(-1, 1),
        unclaimed=often,
    )
    def claim_gpu(
        self, kind: ClaimKind, ref: Ref, device: Device, copies: int, priority: int, unclaimed: bool
    ) -> None:
        """A pin there, or somebody who waits for it."""
        more = {"copies": copies, "priority": priority, "unclaimed": unclaimed}
        self.world.claim(kind, ref, device, **(more if kind is ClaimKind.PIN else {}))
        self.then()

    @rule(
        ref=st.sampled_from(REFS),
        device=st.sampled_from([DISK, HOST]),
        prefers=st.sampled_from([(X,), (Y, HOST), (X, Y), ()]),
        room=st.none() | st.builds(Room, st.sampled_from([X, Y]), st.sampled_from([20, 50, 96, 101])),
    )
    def lease(self, ref: Ref, device: Device, prefers: tuple[Device, ...], room: Room | None) -> None:
        """An engine starts on a GPU."""
        self.world.claim(ClaimKind.LEASE, ref, device, prefers=prefers, room=room)
        self.then()

    @precondition(lambda self: self.world.state.starting)
    @rule(index=indices)
    def holder_ready(self, index: int) -> None:
        starting = list(self.world.state.starting)
        self.world.happen(t.HolderReady(starting[index % len(starting)]))
        self.then()

    @rule(
        device=st.sampled_from([X, Y]),
        others=st.sampled_from([0, 0, 30, 60, 97]),
        unfit=st.sampled_from(["", "", "", "an XID"]),
        told=often,
    )
    def others_take(self, device: Device, others: int, unfit: str, told: bool) -> None:
        self.world.others[device], self.world.unfit[device] = others, unfit
        if told:
            self.world.tell()
        self.then()

    @rule(by=st.sampled_from([{}, {X: "default/a"}, {X: "default/b"}, {X: "default/a", Y: "default/a"}]))
    def orchestrator_tells(self, by: dict[Device, str]) -> None:
        self.world.give(by)
        self.then()

    @rule(device=st.sampled_from([X, Y]), ahead=st.booleans())
    def gpu_tells(self, device: Device, ahead: bool) -> None:
        self.world.see_standby(ahead, device)
        self.then()

    @rule(device=st.sampled_from([X, Y]), died=st.booleans(), late=st.booleans())
    def gpu_goes(self, device: Device, died: bool, late: bool) -> None:
        if device in self.world.connected:
            self.world.lose_standby(died, late, device)
        self.then()

    def pass_time(self, seconds: float) -> None:
        self.world.tell()
        super().pass_time(seconds)
        self.world.tell()


TestNode = Node.TestCase
TestGpuNode = GpuNode.TestCase
TestGpuNode.settings = settings(
    max_examples=int(EXAMPLES or 60),
    stateful_step_count=50,
    derandomize=EXAMPLES is None,
    database=None,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
TestNode.settings = settings(
    max_examples=int(EXAMPLES or 200),
    stateful_step_count=50,
    derandomize=EXAMPLES is None,
    database=None,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
