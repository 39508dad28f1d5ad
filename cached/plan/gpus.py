"""What stands on which GPU: room for engines, who owns a GPU, loads, and what leaves when memory runs short.

Owns every decision about GPU memory but where copies of pools go, which is in ``pools``; ``decide`` asks it
within a tick. Pure, like that.

What is granted from a GPU stays there for as long as a lease holds it. Everything else yields:

- Only pins cause loads. A lease takes what stands on the GPU that it prefers, or is met elsewhere.
- A pin that is ``unclaimed`` stands on GPUs that the orchestrator has given to nobody (all of them, where no
  orchestrator tells), and leaves when one is given away. A GPU that was given away belongs to its tenant: a
  pin, ``unclaimed`` or not, is loaded onto it once, within ``claimed_grace_s`` of when that was seen (or of
  the pin), and leaves again where no lease took it within as long. So a tenant that acquires soon finds it
  there, whoever acquires later streams it from the host, and nothing is loaded beside a tenant that runs.
- Room that a lease asks for is made of residents that nobody has leased, and while its holder starts, nothing
  moves there but for want of memory. Below the reserve the coldest leave one by one.
- What had to leave for others comes back only when there is room to spare, after a pause that doubles from
  FIRST_PAUSE_S to LAST_PAUSE_S; until it is over, no older pin is loaded onto that GPU in its place.
- Those that leave first: what no pin wants there, then pins of the lowest priority, then the coldest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from operator import itemgetter

from cached.model import (
    ArtifactId,
    Claim,
    ClaimId,
    ClaimKind,
    Device,
    ErrorKind,
    Problem,
    Room,
)
from cached.plan import types as t
from cached.plan.memory import Memory
from cached.plan.pools import Pools
from cached.plan.state import Place, Spot, State, is_gpu, is_moving
from cached.plan.tick import Tick
from cached.plan.words import (
    ROOM_RETRY_S,
    STANDBY_WAIT_S,
    gb,
    name_of,
    no_standby_problem,
    no_tensors_problem,
    not_pinned_problem,
    other_uid_problem,
    unfit_problem,
)


class Gpus:
    """One tick's decisions about GPUs, with what they already use up."""

    def __init__(self, tick: Tick) -> None:
        self.tick = tick
        self.state = tick.state
        self.now = tick.now
        self.memory = Memory(tick)
        self.pools = Pools(self.memory, self._load)
        self.loading: set[Device] = set()
        self.promised: Counter[Device] = Counter()
        for claim_id, until in self.state.starting.items():
            room = self.state.claims[claim_id].room
            if room is not None and until > self.now:
                self.promised[room.device] += room.size_bytes
        tick.still |= set(self.promised)

    # --- rooms ------------------------------------------------------------------------------

    def refuse_rooms(self) -> None:
        """Room that cannot be had is refused at once, whatever else its claim waits for."""
        for claim_id in self.state.rooms:
            claim = self.state.claims[claim_id]
            answered = claim_id in self.tick.ended or claim_id in self.tick.granted
            if not answered and claim.room is not None:
                problem = self._room_problem(claim, claim.room)
                if problem is not None:
                    self.tick.refuse(claim, problem)

    def _room_problem(self, claim: Claim, room: Room) -> Problem | None:
        place = self.state.places.get(room.device) if is_gpu(room.device) else None
        if place is None or place.inventory is None:
            since = max(claim.made_at, place.gone_at if place else 0.0)
            if place is None and (self.memory.connected() or not is_gpu(room.device)):
                return self.memory.unknown_problem(room.device)
            return no_standby_problem(room.device) if since + STANDBY_WAIT_S <= self.now else None
        if place.unfit_reason:
            return unfit_problem(room.device, place)
        leaving = self._for_room(claim, room)
        fits = self._to_have(room, leaving, coming=True) is not None
        return None if fits or not self.memory.settled(room.device) else self._no_room(claim, room, leaving)

    def _for_room(self, claim: Claim, room: Room) -> list[Spot]:
        """What may leave for it: never what the same claim is to be given there."""
        own = room.device in claim.prefers or room.device == claim.device
        return [s for s in self.memory.may_leave(room.device) if not (own and s[1] == claim.artifact)]

    def _to_have(self, room: Room, leaving: list[Spot], coming: bool) -> list[Spot] | None:
        """Which of these have to leave for the room. ``coming``: as if loads under way could leave, too."""
        device = room.device
        ledger = self.memory.without(
            device, lambda r: is_moving(r) or (coming and r.step is t.ResidentStep.LOADING)
        )
        for spot in self.tick.released:
            ledger.remove(self.state.residencies[spot].items if spot[0] == device else ())
        free_bytes = self.memory.free_bytes(device) + self.state.places[device].ledger.used_bytes
        free_bytes -= 0 if coming else self.memory.loading_bytes(device)
        return self.memory.fewest(ledger, leaving, lambda d: free_bytes - d.used_bytes >= room.size_bytes)

    def has_room(self, claim: Claim, room: Room) -> bool:
        """Whether the room is there; where not, begin to make it."""
        place = self.state.places.get(room.device)
        if place is None or place.unfit_reason:
            return False
        free_bytes = self.memory.free_bytes(room.device) - self.memory.loading_bytes(room.device)
        if free_bytes - self.promised[room.device] >= room.size_bytes:
            self.tick.still.add(room.device)
            self.promised[room.device] += room.size_bytes
            return True
        self.tick.still.add(room.device)
        if not self.promised[room.device] and self.memory.settled(room.device):
            for spot in self._to_have(room, self._for_room(claim, room), coming=False) or ():
                self.tick.release(spot, f"room for {claim.ref}", thrown=bool(self.memory.pins(spot)))
        return False

    def _no_room(self, claim: Claim, room: Room, leaving: list[Spot]) -> Problem:
        memory, inventory = self.memory, self.state.places[room.device].inventory
        total_bytes = inventory.gpu.total_bytes if inventory is not None and inventory.gpu is not None else 0
        never = room.size_bytes > total_bytes
        return Problem(
            ErrorKind.NO_ROOM,
            "NO_ROOM",
            f"{gb(room.size_bytes)} cannot be made free on {room.device} for {claim.ref}: it has "
            f"{gb(total_bytes)}, of which {gb(memory.free_bytes(room.device))} are free, and what nobody "
            f"leases there would give back {gb(memory.given_back(room.device, leaving))}"
            + memory.holders(room.device, leaving),
            "ask for less room, or use a larger device"
            if never
            else f"end a holder on {room.device}, or whatever else takes memory there; or ask for less room",
            None if never else ROOM_RETRY_S,
        )

    # --- what leaves ------------------------------------------------------------------------

    def relieve(self) -> None:
        """Residents leave what is given to somebody else, or out of memory."""
        for device in self.memory.connected():
            if self.state.places[device].unfit_reason:
                continue
            if device not in self.tick.still:
                self._see_out(device)
            self._last_resort(device)

    def vacate(self) -> None:
        """Residents leave what is unfit, after those who waited for just that are refused."""
        for device in self.memory.connected():
            why = self.state.places[device].unfit_reason
            for spot in self.memory.may_leave(device) if why else ():
                self.tick.release(spot, f"the device is unfit: {why}")

    def _see_out(self, device: Device) -> None:
        """What nothing entitles to stand there leaves after a while."""
        tenant, since = self.memory.tenant(device), self.state.claimed_since.get(device, 0.0)
        why = f"the device is given to {tenant}" if tenant is not None else "nothing keeps it there"
        until = self.now - self.state.rules.claimed_grace_s
        for spot in self.memory.residents.get(device, ()) if since <= until else ():
            residency = self.state.residencies[spot]
            if residency.step is not t.ResidentStep.RESIDENT or spot in self.tick.released:
                continue
            kept = max(residency.since, residency.last_used_at) > until
            kept = kept or (tenant is None and any(pin.unclaimed for pin in self.memory.pins(spot)))
            if not kept and not self.memory.leased(spot):
                self.tick.release(spot, why)

    def _last_resort(self, device: Device) -> None:
        reserve_bytes = self.state.rules.gpu_reserve_bytes
        free_bytes = self.memory.free_bytes(device)
        leaving = any(is_moving(self.state.residencies[s]) for s in self.memory.residents.get(device, ()))
        leaving = leaving or any(spot[0] == device for spot in self.tick.released)
        if free_bytes >= reserve_bytes or leaving or not self.memory.settled(device):
            return
        for spot in self.memory.may_leave(device)[:1]:
            why = f"only {gb(free_bytes)} of {device} are free, less than the reserve of {gb(reserve_bytes)}"
            self.tick.release(spot, why, thrown=bool(self.memory.pins(spot)))

    # --- loads ------------------------------------------------------------------------------

    def load(self) -> None:
        """Load what pins want: first what somebody waits for, then by priority. Among equals pools, which may
        choose, come last: by then it is known what the others cannot have."""
        state, ended = self.state, self.tick.ended
        pools = [(state.claims[c], a) for c in state.pools if (a := state.claims[c].artifact) is not None]
        pools = [(pool, artifact) for pool, artifact in pools if self.tick.is_sound(artifact)]
        for pool, artifact in pools:
            self.pools.take_back(pool, artifact)
        turns: list[tuple[tuple[bool, float, bool], Callable[[], None]]] = [
            ((True, -pool.priority, True), partial(self.pools.place, pool, a)) for pool, a in pools
        ]
        for spot in state.unloaded.in_order(ended):
            if is_gpu(spot[0]) and not all(c in state.members for c in state.unloaded.claims(spot)):
                nobody_waits = not state.unloaded.urgent(spot, ended)
                turns.append(((nobody_waits, -self.memory.priority(spot), False), partial(self._load, spot)))
        for _, turn in sorted(turns, key=itemgetter(0)):
            turn()
        self.pools.tell_short()

    def _load(self, spot: Spot) -> None:
        """Load it, or make room for it, or say why not."""
        state, place = self.state, self.state.places.get(spot[0])
        if place is None or place.inventory is None or state.stands(*spot):
            return
        pins = self.memory.pins(spot)
        if not self.tick.is_sound(spot[1]) or self._told(spot, pins, place):
            return
        problem = self.memory.standing_problem(spot, pins)
        if problem is not None:
            self.tick.cannot_load(spot, problem)
            return
        if spot[0] in self.tick.still or spot[0] in self.loading or self.memory.is_busy(spot[0]):
            return
        problem = self.memory.thrown_problem(spot, pins)
        leaving = self.memory.may_leave(spot[0], max(pin.priority for pin in pins))
        go = self.memory.to_load(spot, leaving, self.memory.spare_bytes(spot)) if problem is None else None
        if go is None and problem is None and self.memory.settled(spot[0]):
            problem = self.memory.no_room_to_load(spot, leaving)
        if problem is not None:
            self.tick.cannot_load(spot, problem)
            return
        # Nothing else begins here: what comes next in line would eat the room up.
        self.loading.add(spot[0])
        if go == []:
            self.tick.begun.add(spot)
            self.tick.actions.append(t.Load(*spot))
        elif go is not None and self.memory.settled(spot[0]):
            for other in go:
                self.tick.release(other, f"room for {name_of(state, spot[1])}")

    def _told(self, spot: Spot, pins: list[Claim], place: Place) -> bool:
        """Whether there is nothing to load (by now): tell those who wait why."""
        claims = self.state.unloaded.claims(spot)
        residency = self.tick.record(spot)
        if not pins:
            self._refuse_waiters(claims, not_pinned_problem(spot[0]))
            return True
        if place.unfit_reason:
            self._refuse_waiters(claims, unfit_problem(spot[0], place))
        if residency is None or (spot in self.tick.placed and residency.step is t.ResidentStep.REFUSED):
            return False
        if residency.problem is None:
            return True
        again = self.tick.tell(claims, residency) or spot in self.tick.placed
        return not again or residency.retry_at > self.now or residency.step is t.ResidentStep.RELEASING

    def _refuse_waiters(self, claims: Iterable[ClaimId], problem: Problem) -> None:
        for claim in self.tick.waiters(claims):
            self.tick.refuse(claim, problem)


def swap_problem(
    state: State, device: Device, out: ArtifactId | None, artifact: ArtifactId, priority: int = 0
) -> Problem | None:
    """Why ``artifact`` could not be pinned on a GPU in the place of ``out``: None where it can be, or where
    its size is not known yet. To be asked before the one pin ends and the other is made."""
    memory = Memory(Tick(state, float("inf")))
    place = state.places.get(device) if is_gpu(device) else None
    if place is None:
        return memory.unknown_problem(device)
    if place.inventory is None:
        return no_standby_problem(device)
    if place.unfit_reason:
        return unfit_problem(device, place)
    if artifact not in state.artifacts or memory.is_there((device, artifact)):
        return None
    if not state.items_on(device, artifact):
        return no_tensors_problem(name_of(state, artifact), device)
    spot = device, artifact
    below = set(memory.may_leave(device, priority))
    leaving = [s for s in memory.may_leave(device) if s in below or s[1] == out]
    fits = memory.to_load(spot, leaving, memory.spare_bytes(spot)) is not None
    return None if fits else memory.no_room_to_load(spot, leaving)


def sharing_problem(state: State, claim: Claim, artifact: ArtifactId, uid: int) -> Problem | None:
    """Why ``uid`` is not given an artifact on a GPU now: whoever holds its memory could write to it, so only
    one uid has any of its contents at a time. None where it may."""
    wanted = set(state.artifacts[artifact].artifact.images)
    for (device, near), claims in state.on.items():
        known = state.artifacts.get(near)
        if device != claim.device or known is None or wanted.isdisjoint(known.artifact.images):
            continue
        for other in map(state.claims.__getitem__, claims):
            seen = other.holder.uid if other.holder is not None else None
            if other.kind is ClaimKind.LEASE and other.id != claim.id and seen not in (None, uid):
                return other_uid_problem(claim, uid)
    return None
