"""Pools: pins that want copies on some GPUs, or on each of them.

Owns where a copy is placed, when it is taken back and when it moves; ``gpus`` loads it there. Pure.

A copy that stands stays where it is. It moves when its GPU is gone, unfit or given away, or when it cannot be
loaded there and another has room.
"""

from __future__ import annotations

from collections.abc import Callable

from cached.model import (
    ANY_GPU,
    ArtifactId,
    Claim,
    ClaimId,
    Device,
    ErrorKind,
    Problem,
)
from cached.plan import types as t
from cached.plan.memory import NAMED, Memory
from cached.plan.state import Spot, is_moving, member_id
from cached.plan.words import (
    OF_OWNERS,
    ROOM_RETRY_S,
    STANDBY_WAIT_S,
    not_pinned_problem,
)


class Pools:
    """One tick's decisions about the copies of pools."""

    def __init__(self, memory: Memory, load: Callable[[Spot], None]) -> None:
        self.memory = memory
        self.tick = memory.tick
        self.state = memory.state
        self.now = memory.now
        self.load = load
        self.moved: set[Spot] = set()
        self.had: dict[ClaimId, list[Device]] = {}
        for member, pool in self.state.members.items():
            self.had.setdefault(pool, []).append(self.state.claims[member].device)
        self.short: list[tuple[Claim, ArtifactId, int, int]] = []

    def take_back(self, pool: Claim, artifact: ArtifactId) -> None:
        """Take copies back from devices that are gone, unfit or given away."""
        for device in self._copies_on(pool):
            place, why = self.state.places[device], ""
            if place.inventory is None:
                why = "the device is gone" if place.gone_at + STANDBY_WAIT_S <= self.now else ""
            elif place.unfit_reason:
                why = f"the device is unfit: {place.unfit_reason}"
            elif not self.memory.is_there((device, artifact)):
                problem = self.memory.standing_problem((device, artifact), [pool])
                why = problem.message if problem is not None else ""
            if why:
                self._unplace(pool, device, why)

    def place(self, pool: Claim, artifact: ArtifactId) -> None:
        """Give a pool's pin its copies, and load them; a copy that stands stays where it is."""
        connected, kept = self.memory.connected(), self._copies_on(pool)
        want = pool.copies if pool.device == ANY_GPU else max(1, len(connected))
        stuck = [d for d in kept if pool.device == ANY_GPU and self._is_stuck((d, artifact))]
        lacks = 0 if self._is_told((pool.device, artifact)) else max(0, want - len(kept))
        free = self._candidates(pool, artifact) if lacks or stuck else []
        moves = dict(zip(stuck, free[lacks:], strict=False))
        for device, better in moves.items():
            self._unplace(pool, device, f"there is room on {better}, and none here")
        new = [*moves.values(), *free[:lacks]]
        for device in new:
            self._place_on(pool, device, artifact)
        copies = new + [d for d in kept if d not in moves]
        for device in copies:
            self.load((device, artifact))
        if len(copies) < want:
            self.short.append((pool, artifact, len(copies), want))

    def tell_short(self) -> None:
        """Say of pools why copies have no place, once all places are known."""
        if self.short and all(map(self.memory.settled, self.memory.connected())):
            for pool, artifact, got, want in self.short:
                spot = pool.device, artifact
                if spot not in self.tick.told and not self._is_told(spot):
                    self.tick.cannot_load(spot, self._unplaced_problem(pool, artifact, got, want))

    def _is_stuck(self, spot: Spot) -> bool:
        """Load a copy, unless that failed before: whether it had better go elsewhere."""
        residency = self.state.residencies.get(spot)
        if residency is None or residency.problem is None:
            self.load(spot)
            return spot in self.tick.told
        return spot in self.tick.told or (spot not in self.tick.begun and not self._is_told(spot))

    def _copies_on(self, pool: Claim) -> list[Device]:
        """Where it has a copy, or is to have one."""
        return [d for d in self.had.get(pool.id, ()) if member_id(pool.id, d) not in self.tick.ended]

    def _place_on(self, pool: Claim, device: Device, artifact: ArtifactId) -> None:
        self.tick.placed.setdefault((device, artifact), []).append(pool)
        self.moved.add((pool.device, artifact))
        self.tick.actions.append(t.Place(pool.id, device))

    def _unplace(self, pool: Claim, device: Device, why: str) -> None:
        assert pool.artifact is not None
        self.moved.add((pool.device, pool.artifact))
        self.tick.ended.add(member_id(pool.id, device))
        self.tick.actions.append(t.Unplace(pool.id, device, why))

    def _is_told(self, spot: Spot) -> bool:
        """Whether a failure was told, and it is not time to try again."""
        record = self.tick.record(spot)
        if record is None or record.problem is None or spot in self.moved:
            return False
        return record.retry_at > self.now or record.step is not t.ResidentStep.FAILED

    # --- which device -----------------------------------------------------------------------

    def _candidates(self, pool: Claim, artifact: ArtifactId) -> list[Device]:
        """Where a copy may be placed, the best first; of a pool of each GPU, whether there is room or not."""
        devices = [d for d in self.memory.connected() if d not in self.had.get(pool.id, ())]
        found = [d for d in devices if not self.memory.standing_problem((d, artifact), [pool])]
        if pool.device != ANY_GPU:
            return found
        return sorted((d for d in found if self._takes(pool, d, artifact)), key=self._warmth(pool, artifact))

    def _takes(self, pool: Claim, device: Device, artifact: ArtifactId) -> bool:
        """Whether the device has it, or takes it now beside what is queued for it."""
        spot = device, artifact
        record = self.tick.record(spot)
        if record is not None and is_moving(record):
            return False
        if self.memory.is_there(spot):
            return spot not in self.tick.released
        # Who may stand there was refused to another pin, and is not to this one.
        told = record.problem.reason if record is not None and record.problem is not None else ""
        if self._is_told(spot) and told not in OF_OWNERS:
            return False
        if self.memory.pause_over_at(device, [pool]) > self.now:
            return False
        leaving = self.memory.may_leave(device, pool.priority)
        queued = self._queued(device, pool.priority, artifact)
        return self.memory.to_load(spot, leaving, self.memory.spare_bytes(spot), queued) is not None

    def _queued(self, device: Device, priority: int, but: ArtifactId) -> set[Spot]:
        """What pins of this priority or a higher one are to have here and do not have yet."""
        waiting = (*self.state.unloaded.in_order(), *self.tick.placed, *self.tick.begun)
        here = {spot for spot in waiting if spot[0] == device and spot[1] != but}
        return {spot for spot in here if spot in self.tick.begun or self._is_queued(spot, priority)}

    def _is_queued(self, spot: Spot, priority: int) -> bool:
        return (
            spot[1] in self.state.artifacts
            and self.tick.record(spot) is None
            and self.memory.priority(spot) >= priority
            and self.memory.standing_problem(spot, self.memory.pins(spot)) is None
        )

    def _warmth(
        self, pool: Claim, artifact: ArtifactId
    ) -> Callable[[Device], tuple[bool, bool, int, Device]]:
        """The order in which GPUs are chosen: what has it, what loads it, what has the most memory free."""

        def key(device: Device) -> tuple[bool, bool, int, Device]:
            there = self.memory.is_there((device, artifact))
            resident = there and self.state.is_resident(device, artifact)
            queued = self._queued(device, pool.priority, artifact)
            queued_bytes = sum(size for spot in queued for _, size in self.state.items_on(*spot))
            return not resident, not there, queued_bytes - self.memory.free_bytes(device), device

        return key

    # --- who waits for one ------------------------------------------------------------------

    def answer(self, spot: Spot) -> None:
        """Leases on a pool (somebody waits for a pin's copies) are met once all of them stand."""
        waiting = self.tick.waiters(self.state.unloaded.claims(spot))
        pools = {pin.id for pin in self.memory.pins(spot)}
        copies = self._copies(pools, spot[1])
        records = map(self.tick.record, (spot, *copies))
        problem = next((r.problem for r in records if r is not None and r.problem is not None), None)
        if not pools:
            problem = not_pinned_problem(spot[0])
        there = [s for s in copies if self.state.stands(*s) and s not in self.tick.released]
        for claim in waiting if self.tick.is_sound(spot[1]) else ():
            if problem is not None:
                self.tick.refuse(claim, problem)
            elif there and len(there) == len(copies):
                self.tick.grant(claim, there[0][0], spot[1])

    def _copies(self, pools: set[ClaimId], artifact: ArtifactId) -> list[Spot]:
        """Where these pools have, or are about to have, a copy of it."""
        members = [m for m, pool in self.state.members.items() if pool in pools and m not in self.tick.ended]
        placed = [s for s, new in self.tick.placed.items() if any(claim.id in pools for claim in new)]
        return [(self.state.claims[m].device, artifact) for m in members] + [
            s for s in placed if s[1] == artifact
        ]

    def _unplaced_problem(self, pool: Claim, artifact: ArtifactId, got: int, want: int) -> Problem:
        reasons, hints = [], set()
        for device in self.memory.connected()[:NAMED]:
            spot, leaving = (device, artifact), self.memory.may_leave(device, pool.priority)
            problem = self.memory.standing_problem(spot, [pool])
            if problem is None and spot not in self.tick.placed and not self.memory.is_there(spot):
                problem = self.memory.thrown_problem(spot, [pool])
                problem = problem or self.memory.no_room_to_load(spot, leaving)
            if problem is not None and member_id(pool.id, device) not in self.state.members:
                reasons.append(problem.message)
                hints.add(problem.hint)
        several = "unpin something, pin fewer copies, or see in 'cachectl status' why a GPU is not fit"
        return Problem(
            ErrorKind.NO_ROOM,
            "NOT_PLACED",
            f"{got} of {want} copies of {pool.ref} have a place on {pool.device}: "
            + ("; ".join(reasons) or f"{len(self.memory.connected())} GPUs are connected"),
            hints.pop() if len(hints) == 1 else several,
            ROOM_RETRY_S,
        )
