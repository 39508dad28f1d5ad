"""What stands on which GPU: room for engines, who owns a GPU, pools, and what leaves when memory runs short.

Owns every decision about GPU memory; ``decide`` asks it within a tick. Pure, like that.

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
    ANY_GPU,
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
from cached.plan.ledger import Ledger
from cached.plan.state import Place, Spot, State, is_gpu, is_moving, is_standing, member_id
from cached.plan.tick import Tick
from cached.plan.words import (
    OF_OWNERS,
    ROOM_RETRY_S,
    STANDBY_WAIT_S,
    claim_words,
    gb,
    given_problem,
    name_of,
    no_standby_problem,
    no_tensors_problem,
    not_pinned_problem,
    unclaimed_problem,
    unfit_problem,
)

FIRST_PAUSE_S = 30.0
LAST_PAUSE_S = 3600.0
NAMED = 8
"""So many residents or devices are named in one problem."""


def pause_s(times: int) -> float:
    """Seconds for which what was thrown out ``times`` times in a row stays away."""
    return min(LAST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(max(0, times - 1), 20))


class Gpus:
    """One tick's decisions about GPUs, with what they already use up."""

    def __init__(self, tick: Tick) -> None:
        self.tick = tick
        self.state = tick.state
        self.now = tick.now
        self.taken: set[Spot] = set()
        self.placed: dict[Spot, list[Claim]] = {}
        self.moved: set[Spot] = set()
        self.short: list[tuple[Claim, ArtifactId, int, int]] = []
        self.loading: set[Device] = set()
        self.begun: set[Spot] = set()
        self.promised: Counter[Device] = Counter()
        for claim_id, until in self.state.starting.items():
            room = self.state.claims[claim_id].room
            if room is not None and until > self.now:
                self.promised[room.device] += room.size_bytes
        self.still = set(self.promised)
        self.residents: dict[Device, list[Spot]] = {}
        for spot in self.state.residencies:
            if is_gpu(spot[0]):
                self.residents.setdefault(spot[0], []).append(spot)

    # --- who has what -----------------------------------------------------------------------

    def _connected(self) -> list[Device]:
        return [d for d, place in self.state.places.items() if is_gpu(d) and place.inventory is not None]

    def _pins(self, spot: Spot) -> list[Claim]:
        claims = [*self.state.claims_on(*spot), *self.placed.get(spot, ())]
        return [c for c in claims if c.kind is ClaimKind.PIN and c.id not in self.tick.ended]

    def _leased(self, spot: Spot) -> bool:
        claims = (self.state.claims[c] for c in self.state.on.get(spot, ()))
        leases = (c for c in claims if c.kind is not ClaimKind.PIN and c.id not in self.tick.ended)
        return spot in self.taken or next(leases, None) is not None

    def _priority(self, spot: Spot) -> float:
        return max((pin.priority for pin in self._pins(spot)), default=float("-inf"))

    def _may_leave(self, device: Device, below: float = float("inf")) -> list[Spot]:
        """Residents that no lease and no pin of such a priority holds; the first to leave first."""
        found = [
            spot
            for spot in self.residents.get(device, ())
            if self.state.residencies[spot].step is t.ResidentStep.RESIDENT
            and spot not in self.tick.released
            and not self._leased(spot)
            and self._priority(spot) < below
        ]
        return sorted(found, key=lambda spot: (self._priority(spot), self.tick.coldness(spot)))

    # --- arithmetic -------------------------------------------------------------------------

    def _settled(self, device: Device) -> bool:
        """Whether the figures are surely newer than what moved there last."""
        return self.now >= self.state.places[device].settles_at

    def _free_bytes(self, device: Device) -> int:
        """What is surely free, but for loads under way."""
        place = self.state.places[device]
        assert place.inventory is not None
        free_bytes = place.inventory.gpu.free_bytes if place.inventory.gpu else 0
        return free_bytes - (0 if self._settled(device) else place.taken_bytes)

    def _without(self, device: Device, leaves: Callable[[t.Residency], bool]) -> Ledger:
        """What the device counts without some of it."""
        ledger = self.state.places[device].ledger.draft()
        for spot in self.residents.get(device, ()):
            if leaves(self.state.residencies[spot]):
                ledger.remove(self.state.residencies[spot].items)
        return ledger

    def _loading_bytes(self, device: Device) -> int:
        """What loads under way may still take."""
        without = self._without(device, lambda r: r.step is t.ResidentStep.LOADING)
        return self.state.places[device].ledger.used_bytes - without.used_bytes

    def _fewest(
        self, ledger: Ledger, leaving: Iterable[Spot], enough: Callable[[Ledger], bool]
    ) -> list[Spot] | None:
        """As few of the first that have to leave until it is enough; None where all are not enough."""
        picked: list[Spot] = []
        for spot in leaving:
            if enough(ledger):
                break
            ledger.remove(self.state.residencies[spot].items)
            picked.append(spot)
        if not enough(ledger):
            return None
        for spot in list(picked):
            ledger.add(self.state.residencies[spot].items)
            if enough(ledger):
                picked.remove(spot)
            else:
                ledger.remove(self.state.residencies[spot].items)
        return picked

    def _to_load(
        self, spot: Spot, leaving: list[Spot], spare_bytes: int, queued: Iterable[Spot] = ()
    ) -> list[Spot] | None:
        """Which of these have to leave so that it fits beside the rest, and beside what is ``queued``."""
        device, artifact = spot
        place, items = self.state.places[device], self.state.items_on(device, artifact)
        ledger = place.ledger.draft()
        for other in queued:
            ledger.add(self.state.items_on(*other))
        free_bytes = self._free_bytes(device) - self._loading_bytes(device) + place.ledger.used_bytes
        most_bytes = min(place.capacity_bytes, free_bytes - spare_bytes)
        return self._fewest(ledger, leaving, lambda d: d.used_bytes + d.missing_bytes(items) <= most_bytes)

    # --- grants and rooms -------------------------------------------------------------------

    def grant(self, claim: Claim, device: Device, artifact: ArtifactId) -> None:
        self.taken.add((device, artifact))
        self.tick.actions.append(t.Grant(claim.id, device))

    def refuse_rooms(self) -> None:
        """Room that cannot be had is refused at once, whatever else its claim waits for."""
        for claim_id in self.state.rooms:
            claim = self.state.claims[claim_id]
            if claim_id not in self.tick.ended and claim.room is not None:
                problem = self._room_problem(claim, claim.room)
                if problem is not None:
                    self.tick.refuse(claim, problem)

    def _room_problem(self, claim: Claim, room: Room) -> Problem | None:
        place = self.state.places.get(room.device) if is_gpu(room.device) else None
        if place is None or place.inventory is None:
            since = max(claim.made_at, place.gone_at if place else 0.0)
            if place is None and (self._connected() or not is_gpu(room.device)):
                return self._unknown(room.device)
            return no_standby_problem(room.device) if since + STANDBY_WAIT_S <= self.now else None
        if place.unfit_reason:
            return unfit_problem(room.device, place)
        leaving = self._for_room(claim, room)
        fits = self._to_have(room, leaving, coming=True) is not None
        return None if fits or not self._settled(room.device) else self._no_room(claim, room, leaving)

    def _for_room(self, claim: Claim, room: Room) -> list[Spot]:
        """What may leave for it: never what the same claim is to be given there."""
        own = room.device in claim.prefers or room.device == claim.device
        return [s for s in self._may_leave(room.device) if not (own and s[1] == claim.artifact)]

    def _to_have(self, room: Room, leaving: list[Spot], coming: bool) -> list[Spot] | None:
        """Which of these have to leave for the room. ``coming``: as if loads under way could leave, too."""
        device = room.device
        ledger = self._without(device, is_moving)
        loads_bytes = self._loading_bytes(device)
        free_bytes = self._free_bytes(device) + (loads_bytes if coming else -loads_bytes)
        free_bytes += self.state.places[device].ledger.used_bytes
        return self._fewest(ledger, leaving, lambda d: free_bytes - d.used_bytes >= room.size_bytes)

    def has_room(self, claim: Claim, room: Room) -> bool:
        """Whether the room is there; where not, begin to make it."""
        place = self.state.places.get(room.device)
        if place is None or place.unfit_reason:
            return False
        free_bytes = self._free_bytes(room.device) - self._loading_bytes(room.device)
        if free_bytes - self.promised[room.device] >= room.size_bytes:
            self.still.add(room.device)
            self.promised[room.device] += room.size_bytes
            return True
        self.still.add(room.device)
        if not self.promised[room.device] and self._settled(room.device):
            for spot in self._to_have(room, self._for_room(claim, room), coming=False) or ():
                self.tick.release(spot, f"room for {claim.ref}", thrown=bool(self._pins(spot)))
        return False

    # --- what leaves ------------------------------------------------------------------------

    def relieve(self) -> None:
        """Residents leave what is unfit, given to somebody else, or out of memory."""
        for device in self._connected():
            place = self.state.places[device]
            if place.unfit_reason:
                for spot in self._may_leave(device):
                    self.tick.release(spot, f"the device is unfit: {place.unfit_reason}")
                continue
            if device not in self.still:
                self._see_out(device)
            self._last_resort(device)

    def _see_out(self, device: Device) -> None:
        """What nothing entitles to stand there leaves after a while."""
        tenant, since = self._tenant(device), self.state.claimed_since.get(device, 0.0)
        why = f"the device is given to {tenant}" if tenant is not None else "nothing keeps it there"
        until = self.now - self.state.rules.claimed_grace_s
        for spot in self.residents.get(device, ()) if since <= until else ():
            residency = self.state.residencies[spot]
            if residency.step is not t.ResidentStep.RESIDENT or spot in self.tick.released:
                continue
            kept = tenant is None and any(pin.unclaimed for pin in self._pins(spot))
            if not kept and max(residency.since, residency.last_used_at) <= until and not self._leased(spot):
                self.tick.release(spot, why)

    def _tenant(self, device: Device) -> str | None:
        return (self.state.claimed_gpus or {}).get(device)

    def _last_resort(self, device: Device) -> None:
        reserve_bytes = self.state.rules.gpu_reserve_bytes
        free_bytes = self._free_bytes(device)
        leaving = any(is_moving(self.state.residencies[s]) for s in self.residents.get(device, ()))
        leaving = leaving or any(spot[0] == device for spot in self.tick.released)
        if free_bytes >= reserve_bytes or leaving or not self._settled(device):
            return
        for spot in self._may_leave(device)[:1]:
            why = f"only {gb(free_bytes)} of {device} are free, less than the reserve of {gb(reserve_bytes)}"
            self.tick.release(spot, why, thrown=bool(self._pins(spot)))

    # --- loads ------------------------------------------------------------------------------

    def load(self) -> None:
        """Load what pins want: first what somebody waits for, then by priority. Among equals pools, which may
        choose, come last: by then it is known what the others cannot have."""
        state, ended = self.state, self.tick.ended
        pools = [(state.claims[c], a) for c in state.pools if (a := state.claims[c].artifact) is not None]
        pools = [(pool, artifact) for pool, artifact in pools if self.tick.is_sound(artifact)]
        for pool, artifact in pools:
            self._take_back(pool, artifact)
        turns: list[tuple[tuple[bool, float, bool], Callable[[], None]]] = [
            ((True, -pool.priority, True), partial(self._place, pool, a)) for pool, a in pools
        ]
        for spot in state.unloaded.in_order(ended):
            if is_gpu(spot[0]) and not all(c in state.members for c in state.unloaded.claims(spot)):
                nobody_waits = not state.unloaded.urgent(spot, ended)
                turns.append(((nobody_waits, -self._priority(spot), False), partial(self._load, spot)))
        for _, turn in sorted(turns, key=itemgetter(0)):
            turn()
        self._tell_short()

    def _load(self, spot: Spot) -> None:
        """Load it, or make room for it, or say why not."""
        state, pins, place = self.state, self._pins(spot), self.state.places.get(spot[0])
        if place is None or place.inventory is None or state.stands(*spot):
            return
        if not self.tick.is_sound(spot[1]) or self._told(spot, pins, place):
            return
        problem = self._standing_problem(spot, pins)
        if problem is not None:
            self.tick.cannot_load(spot, problem)
            return
        if spot[0] in self.still or spot[0] in self.loading or self._is_busy(spot[0]):
            return
        problem = self._thrown_problem(spot, pins)
        leaving = self._may_leave(spot[0], max(pin.priority for pin in pins))
        go = self._to_load(spot, leaving, self._spare_bytes(spot)) if problem is None else None
        if go is None and problem is None and self._settled(spot[0]):
            problem = self._no_room_to_load(spot, leaving)
        if problem is not None:
            self.tick.cannot_load(spot, problem)
            return
        # Nothing else begins here: what comes next in line would eat the room up.
        self.loading.add(spot[0])
        if go == []:
            self.begun.add(spot)
            self.tick.actions.append(t.Load(*spot))
        elif go is not None and self._settled(spot[0]):
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
        if residency is None or (spot in self.placed and residency.step is t.ResidentStep.REFUSED):
            return False
        if residency.problem is None:
            return True
        again = self.tick.tell(claims, residency)
        return not again or residency.retry_at > self.now or residency.step is t.ResidentStep.RELEASING

    def _refuse_waiters(self, claims: Iterable[ClaimId], problem: Problem) -> None:
        for claim in self._waiters(claims):
            self.tick.refuse(claim, problem)

    def _waiters(self, claims: Iterable[ClaimId]) -> list[Claim]:
        """Those whom a pin's residency would answer."""
        found = [
            self.state.claims[c] for c in claims if c not in self.state.answered and c not in self.tick.ended
        ]
        return [claim for claim in found if claim.kind is not ClaimKind.PIN]

    def _is_busy(self, device: Device) -> bool:
        residencies = [self.state.residencies[spot] for spot in self.residents.get(device, ())]
        loads = sum(r.step is t.ResidentStep.LOADING for r in residencies)
        releases = any(is_moving(r) for r in residencies) or any(s[0] == device for s in self.tick.released)
        return releases or loads >= self.state.load_slots

    def _standing_problem(self, spot: Spot, pins: list[Claim]) -> Problem | None:
        """Why nothing of this may be loaded here, whatever room there is."""
        device, artifact = spot
        place = self.state.places[device]
        if place.unfit_reason:
            return unfit_problem(device, place)
        if not self.state.items_on(device, artifact):
            return no_tensors_problem(name_of(self.state, artifact), device)
        tenant = self._tenant(device)
        if tenant is None:
            return None if any(pin.unclaimed for pin in pins) else unclaimed_problem(device)
        since = max(self.state.claimed_since[device], *(pin.made_at for pin in pins))
        over = since + self.state.rules.claimed_grace_s <= self.now
        return given_problem(device, tenant) if over else None

    def _spare_bytes(self, spot: Spot) -> int:
        """What must stay free beside it; more, where it had to leave before."""
        return self.state.rules.gpu_reserve_bytes * (2 if spot in self.state.thrown else 1)

    def _pause_over_at(self, device: Device, pins: list[Claim]) -> float:
        """When older pins may be loaded here again, after something had to leave."""
        newest = max(pin.made_at for pin in pins)
        thrown = (x for spot, x in self.state.thrown.items() if spot[0] == device and x.at >= newest)
        return max((x.at + pause_s(x.times) for x in thrown), default=0.0)

    def _thrown_problem(self, spot: Spot, pins: list[Claim]) -> Problem | None:
        until = self._pause_over_at(spot[0], pins)
        if until <= self.now:
            return None
        return Problem(
            ErrorKind.NO_ROOM,
            "GPU_FILLED",
            f"what stood on {spot[0]} had to leave for what others took there; "
            f"the next load begins in {until - self.now:.0f} s at the earliest",
            "pin fewer models there, or let engines there take less; replicas get it from the host meanwhile",
            until - self.now,
        )

    # --- pools ------------------------------------------------------------------------------

    def _copies_on(self, pool: Claim) -> list[Device]:
        """Where it has a copy, or is to have one."""
        members = ((d, member_id(pool.id, d)) for d in self.state.places)
        return [d for d, member in members if member in self.state.members and member not in self.tick.ended]

    def _place(self, pool: Claim, artifact: ArtifactId) -> None:
        """Give a pool's pin its copies, and load them; a copy that stands stays where it is."""
        connected, kept = self._connected(), self._copies_on(pool)
        want = pool.copies if pool.device == ANY_GPU else max(1, len(connected))
        stuck = [d for d in kept if pool.device == ANY_GPU and self._stuck(pool, d, artifact)]
        lacks = 0 if self._is_told((pool.device, artifact)) else max(0, want - len(kept))
        free: list[Device] = []
        if lacks or stuck:
            taken_back = [d for d in connected if member_id(pool.id, d) in self.state.members]
            free = self._candidates(pool, artifact, [d for d in connected if d not in taken_back])
        moves = dict(zip(stuck, free[lacks:], strict=False))
        for device, better in moves.items():
            self._unplace(pool, device, f"there is room on {better}, and none here")
            self._place_on(pool, better, artifact)
        new = free[:lacks]
        for device in new:
            self._place_on(pool, device, artifact)
        for device in (*moves.values(), *new, *(d for d in kept if d not in moves)):
            self._load((device, artifact))
        if len(kept) + len(new) < want:
            self.short.append((pool, artifact, len(kept) + len(new), want))

    def _tell_short(self) -> None:
        """Say of pools why copies have no place, once all places are known."""
        if self.short and all(map(self._settled, self._connected())):
            for pool, artifact, got, want in self.short:
                spot = pool.device, artifact
                if spot not in self.tick.told and not self._is_told(spot):
                    self.tick.cannot_load(spot, self._unplaced_problem(pool, artifact, got, want))

    def _place_on(self, pool: Claim, device: Device, artifact: ArtifactId) -> None:
        self.placed.setdefault((device, artifact), []).append(pool)
        self.moved.add((pool.device, artifact))
        self.tick.actions.append(t.Place(pool.id, device))

    def _is_told(self, spot: Spot) -> bool:
        """Whether a failure was told, and it is not time to try again."""
        record = self.tick.record(spot)
        if record is None or record.problem is None or spot in self.moved:
            return False
        return record.retry_at > self.now or record.step is not t.ResidentStep.FAILED

    def _candidates(self, pool: Claim, artifact: ArtifactId, devices: list[Device]) -> list[Device]:
        """Where a copy may be placed, the best first; of a pool of each GPU, whether there is room or not."""
        found = [d for d in devices if not self._standing_problem((d, artifact), [pool])]
        if pool.device != ANY_GPU:
            return found
        return sorted((d for d in found if self._takes(pool, d, artifact)), key=self._warmth(pool, artifact))

    def _take_back(self, pool: Claim, artifact: ArtifactId) -> None:
        """Take copies back from devices that are gone, unfit or given away."""
        for device in self._copies_on(pool):
            place, why = self.state.places[device], ""
            if place.inventory is None:
                why = "the device is gone" if place.gone_at + STANDBY_WAIT_S <= self.now else ""
            elif place.unfit_reason:
                why = f"the device is unfit: {place.unfit_reason}"
            elif not self._is_there((device, artifact)):
                problem = self._standing_problem((device, artifact), [pool])
                why = problem.message if problem is not None else ""
            if why:
                self._unplace(pool, device, why)

    def _unplace(self, pool: Claim, device: Device, why: str) -> None:
        assert pool.artifact is not None
        self.moved.add((pool.device, pool.artifact))
        self.tick.ended.add(member_id(pool.id, device))
        self.tick.actions.append(t.Unplace(pool.id, device, why))

    def _is_there(self, spot: Spot) -> bool:
        residency = self.state.residencies.get(spot)
        return spot in self.begun or (residency is not None and is_standing(residency))

    def _takes(self, pool: Claim, device: Device, artifact: ArtifactId) -> bool:
        """Whether the device has it, or takes it now beside what is queued for it."""
        spot = device, artifact
        record = self.tick.record(spot)
        if record is not None and is_moving(record):
            return False
        if self._is_there(spot):
            return spot not in self.tick.released
        # Who may stand there was refused to another pin, and is not to this one.
        told = record.problem.reason if record is not None and record.problem is not None else ""
        if self._is_told(spot) and told not in OF_OWNERS:
            return False
        if self._pause_over_at(device, [pool]) > self.now:
            return False
        leaving = self._may_leave(device, pool.priority)
        queued = self._queued(device, pool.priority, artifact)
        return self._to_load(spot, leaving, self._spare_bytes(spot), queued) is not None

    def _queued(self, device: Device, priority: int, but: ArtifactId) -> set[Spot]:
        """What pins of this priority or a higher one are to have here and do not have yet."""
        waiting = (*self.state.unloaded.in_order(), *self.placed, *self.begun)
        here = {spot for spot in waiting if spot[0] == device and spot[1] != but}
        return {spot for spot in here if spot in self.begun or self._is_queued(spot, priority)}

    def _is_queued(self, spot: Spot, priority: int) -> bool:
        return (
            spot[1] in self.state.artifacts
            and self.tick.record(spot) is None
            and self._priority(spot) >= priority
            and self._standing_problem(spot, self._pins(spot)) is None
        )

    def _warmth(
        self, pool: Claim, artifact: ArtifactId
    ) -> Callable[[Device], tuple[bool, bool, int, Device]]:
        """The order in which GPUs are chosen: what has it, what loads it, what has the most memory free."""

        def key(device: Device) -> tuple[bool, bool, int, Device]:
            there = self._is_there((device, artifact))
            resident = there and self.state.is_resident(device, artifact)
            queued = self._queued(device, pool.priority, artifact)
            queued_bytes = sum(size for spot in queued for _, size in self.state.items_on(*spot))
            return not resident, not there, queued_bytes - self._free_bytes(device), device

        return key

    def _stuck(self, pool: Claim, device: Device, artifact: ArtifactId) -> bool:
        """Whether a copy could not be loaded, or cannot be now."""
        spot = device, artifact
        residency = self.state.residencies.get(spot)
        if spot in self.tick.told or spot in self.begun:
            return spot in self.tick.told
        if residency is not None:
            return residency.problem is not None and not self._is_told(spot)
        if self._pause_over_at(device, [pool]) > self.now:
            return True
        moving = any(is_moving(self.state.residencies[s]) for s in self.residents.get(device, ()))
        if moving or device in self.still or self.state.places[device].inventory is None:
            return False
        return self._settled(device) and not self._takes(pool, device, artifact)

    def answer_pool(self, spot: Spot) -> None:
        """Leases on a pool (somebody waits for a pin's copies) are met once all of them stand."""
        waiting = self._waiters(self.state.unloaded.claims(spot))
        pools = {pin.id for pin in self._pins(spot)}
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
                self.grant(claim, there[0][0], spot[1])

    def _copies(self, pools: set[ClaimId], artifact: ArtifactId) -> list[Spot]:
        """Where these pools have, or are about to have, a copy of it."""
        members = [m for m, pool in self.state.members.items() if pool in pools and m not in self.tick.ended]
        placed = [s for s, new in self.placed.items() if any(claim.id in pools for claim in new)]
        return [(self.state.claims[m].device, artifact) for m in members] + [
            s for s in placed if s[1] == artifact
        ]

    # --- in words ---------------------------------------------------------------------------

    def _holders(self, device: Device, leaving: Iterable[Spot]) -> str:
        """Who holds what may not leave."""
        stays = [s for s in self.residents.get(device, ()) if s not in set(leaving)]
        stays = [s for s in stays if self.state.residencies[s].items]
        words = [self._holder_words(spot) for spot in stays[:NAMED]]
        more = [f"{len(stays) - NAMED} more"] if len(stays) > NAMED else []
        return "; what stays there: " + ", ".join(words + more) if words else ""

    def _holder_words(self, spot: Spot) -> str:
        residency = self.state.residencies[spot]
        found = (c for c in self.state.claims_on(*spot) if c.id not in self.tick.ended)
        claims = [claim_words(c) for c in sorted(found, key=lambda c: c.kind is ClaimKind.PIN)]
        size = gb(sum(size for _, size in residency.items))
        why = residency.step.value if not claims else f"held by {claims[0]}"
        others = f" and {len(claims) - 1} more" if len(claims) > 1 else ""
        return f"{name_of(self.state, spot[1])} ({size}, {why}{others})"

    def _given_back(self, device: Device, leaving: Iterable[Spot]) -> int:
        ledger = self.state.places[device].ledger.draft()
        for spot in leaving:
            ledger.remove(self.state.residencies[spot].items)
        return self.state.places[device].ledger.used_bytes - ledger.used_bytes

    def _no_room(self, claim: Claim, room: Room, leaving: list[Spot]) -> Problem:
        inventory = self.state.places[room.device].inventory
        total_bytes = inventory.gpu.total_bytes if inventory is not None and inventory.gpu is not None else 0
        never = room.size_bytes > total_bytes
        return Problem(
            ErrorKind.NO_ROOM,
            "NO_ROOM",
            f"{gb(room.size_bytes)} cannot be made free on {room.device} for {claim.ref}: it has "
            f"{gb(total_bytes)}, of which {gb(self._free_bytes(room.device))} are free, and what nobody "
            f"leases there would give back {gb(self._given_back(room.device, leaving))}"
            + self._holders(room.device, leaving),
            "ask for less room, or use a larger device"
            if never
            else f"end a holder on {room.device}, or whatever else takes memory there; or ask for less room",
            None if never else ROOM_RETRY_S,
        )

    def _no_room_to_load(self, spot: Spot, leaving: list[Spot]) -> Problem:
        device, artifact = spot
        place = self.state.places[device]
        need_bytes = sum(size for _, size in self.state.items_on(device, artifact))
        never = need_bytes > place.capacity_bytes
        return Problem(
            ErrorKind.NO_ROOM,
            "DEVICE_CAPACITY",
            f"{name_of(self.state, artifact)} needs {gb(need_bytes)} on {device}; the capacity is "
            f"{gb(place.capacity_bytes)}, {gb(self._free_bytes(device))} are free, of which "
            f"{gb(self._spare_bytes(spot))} stay so, and what may leave would give back "
            f"{gb(self._given_back(device, leaving))}" + self._holders(device, leaving),
            "use a larger device; replicas get it from the host meanwhile"
            if never
            else f"unpin or stop something on {device} ('cachectl ls' shows it), or pin this with a higher "
            "priority; replicas get it from the host meanwhile",
            None if never else ROOM_RETRY_S,
        )

    def _unplaced_problem(self, pool: Claim, artifact: ArtifactId, got: int, want: int) -> Problem:
        reasons = []
        for device in self._connected()[:NAMED]:
            problem = self._standing_problem((device, artifact), [pool])
            if problem is None and not self._is_there((device, artifact)):
                problem = self._thrown_problem((device, artifact), [pool]) or self._no_room_to_load(
                    (device, artifact), self._may_leave(device, pool.priority)
                )
            if problem is not None and member_id(pool.id, device) not in self.state.members:
                reasons.append(problem.message)
        return Problem(
            ErrorKind.NO_ROOM,
            "NOT_PLACED",
            f"{got} of {want} copies of {pool.ref} have a place on {pool.device}: "
            + ("; ".join(reasons) or f"{len(self._connected())} GPUs are connected"),
            "unpin something, pin fewer copies, or see why a GPU is not fit ('cachectl status' shows them)",
            ROOM_RETRY_S,
        )

    def _unknown(self, device: Device) -> Problem:
        known = ", ".join(self._connected()[:NAMED]) or "none"
        return Problem(
            ErrorKind.NOT_FOUND,
            "NO_SUCH_DEVICE",
            f"there is no GPU {device} here for room to be made on; connected: {known}",
            "name one of these; a container sees its own with nvidia-smi -L",
        )


def swap_problem(
    state: State, device: Device, out: ArtifactId | None, artifact: ArtifactId, priority: int = 0
) -> Problem | None:
    """Why ``artifact`` could not be pinned on a GPU in the place of ``out``: None where it can be, or where
    its size is not known yet. To be asked before the one pin ends and the other is made."""
    gpus = Gpus(Tick(state, float("inf")))
    place = state.places.get(device) if is_gpu(device) else None
    if place is None:
        return gpus._unknown(device)
    if place.inventory is None:
        return no_standby_problem(device)
    if place.unfit_reason:
        return unfit_problem(device, place)
    if artifact not in state.artifacts or gpus._is_there((device, artifact)):
        return None
    if not state.items_on(device, artifact):
        return no_tensors_problem(name_of(state, artifact), device)
    spot = device, artifact
    below = set(gpus._may_leave(device, priority))
    leaving = [s for s in gpus._may_leave(device) if s in below or s[1] == out]
    fits = gpus._to_load(spot, leaving, gpus._spare_bytes(spot)) is not None
    return None if fits else gpus._no_room_to_load(spot, leaving)
