"""A state and its clock on a bench: short words for what happens to it, for tests of single policies.

Owns the small revisions that these tests use, and nothing that is asserted.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from plan_world import DISK_BYTES, HOST_BYTES, START, artifact_of, make_revision, note_of

from cached.model import (
    DISK,
    HOST,
    Claim,
    ClaimId,
    ClaimKind,
    Device,
    Gpu,
    Holder,
    Inventory,
    Problem,
    Resident,
    Revision,
)
from cached.plan import State, apply, plan
from cached.plan import types as t

A = make_revision("a", "a")  # 30 bytes
B = make_revision("b", "b")  # 30 bytes
C = make_revision("c", "c")  # 10 bytes
D = make_revision("d", "d")  # 40 bytes
E = make_revision("e", "e")  # 20 bytes
F = make_revision("f", "f")  # 120 bytes: more than the disk
G = make_revision("g", "g")  # 70 bytes: more than memory
ID = {revision.ref: artifact_of(revision).id for revision in (A, B, C, D, E, F, G)}


NO_WATERMARKS = t.Rules(high_watermark=1.0, low_watermark=1.0)


class Bench:
    """A state, its clock, and short words for what happens to it."""

    def __init__(
        self, fetch_slots: int = 2, disk_bytes: int = DISK_BYTES, rules: t.Rules = NO_WATERMARKS
    ) -> None:
        self.state = State(fetch_slots=fetch_slots, rules=rules)
        self.now = START
        self.made = 0
        self.happen(t.CapacitySet(DISK, disk_bytes))

    def happen(self, *events: t.Event) -> None:
        for event in events:
            apply(self.state, event, self.now)

    def tick(self) -> list[t.Action]:
        """Plan once and start all of it; there must be nothing left to plan."""
        actions = plan(self.state, self.now)
        self.happen(*(t.Started(action) for action in actions))
        assert plan(self.state, self.now) == []
        return actions

    def recover(self, *revisions: Revision, claims: tuple[Claim, ...] = (), old_s: float = 0.0) -> None:
        """Start with these artifacts proven on disk, the first one the coldest."""
        artifacts = tuple(artifact_of(r, START - 100 + i) for i, r in enumerate(revisions))
        notes = tuple(note_of(r, START - old_s) for r in revisions)
        self.happen(t.Recovered(artifacts, notes, claims, ()))

    def claim(
        self,
        revision: Revision,
        kind: ClaimKind = ClaimKind.LEASE,
        device: Device = DISK,
        fresh: bool = False,
        expires_at: float | None = None,
        **more: Any,
    ) -> ClaimId:
        self.made += 1
        claim = make_claim(f"{kind.value}-{self.made}", revision, kind, device, self.now, fresh, expires_at)
        self.happen(t.ClaimMade(replace(claim, **more)))
        return claim.id

    def fetching(self, revision: Revision, kind: ClaimKind = ClaimKind.LEASE) -> ClaimId:
        """Somebody claims it, it resolves, and its transfer is started."""
        claim_id = self.claim(revision, kind)
        assert self.tick() == [t.Resolve(revision.ref)]
        self.happen(t.Resolved(revision))
        assert self.tick() == [t.Fetch(revision, background=kind is not ClaimKind.LEASE)]
        return claim_id

    def fetched(self, revision: Revision) -> None:
        artifact = artifact_of(revision, self.now)
        self.happen(t.Fetched(revision.key, artifact, note_of(revision, self.now)))

    def standby(self, *residents: Revision, capacity_bytes: int = HOST_BYTES) -> None:
        held = tuple(Resident(ID[r.ref], r.size_bytes, locked=True) for r in residents)
        inventory = Inventory(HOST, 7, capacity_bytes, True, "", True, held)
        self.happen(t.StandbySeen(inventory, capacity_bytes))

    def gpu(self, device: Device, free_bytes: int, *residents: Revision, total_bytes: int = 100) -> None:
        """A GPU's standby connects; the reserve is kept off its capacity."""
        held = tuple(Resident(ID[r.ref], r.size_bytes, locked=True) for r in residents)
        gpu = Gpu(0, "labelled fake", total_bytes, free_bytes)
        inventory = Inventory(device, 7, total_bytes, True, "", True, held, gpu)
        self.happen(t.StandbySeen(inventory, total_bytes - self.state.rules.gpu_reserve_bytes))

    def gpu_has(self, device: Device, free_bytes: int, unfit: str = "") -> None:
        """The figures of a connected GPU come anew."""
        inventory = self.state.places[device].inventory
        assert inventory is not None and inventory.gpu is not None
        self.happen(t.GpuTold(device, replace(inventory.gpu, free_bytes=free_bytes, unfit_reason=unfit)))

    def loaded(self, revision: Revision, device: Device = HOST) -> None:
        self.happen(t.Loaded(device, Resident(ID[revision.ref], revision.size_bytes, locked=True)))

    def released(self, revision: Revision, device: Device = HOST) -> None:
        self.happen(t.Released(device, ID[revision.ref]))


def make_claim(
    name: str,
    revision: Revision,
    kind: ClaimKind,
    device: Device = DISK,
    at: float = START,
    fresh: bool = False,
    expires_at: float | None = None,
) -> Claim:
    return Claim(ClaimId(name), kind, revision.ref, device, at, fresh=fresh, expires_at=expires_at)


def held_claim(name: str, revision: Revision, device: Device = DISK) -> Claim:
    """A lease as it is found at a start: bound to what it was answered with."""
    return Claim(
        ClaimId(name), ClaimKind.LEASE, revision.ref, device, START - 50,
        revision=revision.key, artifact=ID[revision.ref], holder=Holder(uid=1000, pid=7, host="web-1"),
    )  # fmt: skip


def only(actions: list[t.Action], kind: type[t.Action]) -> list[t.Action]:
    return [action for action in actions if isinstance(action, kind)]


def the_refusal(actions: list[t.Action]) -> Problem:
    (refusal,) = [action for action in actions if isinstance(action, t.Refuse)]
    return refusal.problem
