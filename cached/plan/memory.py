"""What one tick knows of GPU memory: who wants and holds what there, what is free, what may leave.

Owns this arithmetic, the reasons that it gives against a load, and their words; decides nothing. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from cached.model import (
    Claim,
    ClaimKind,
    Device,
    ErrorKind,
    Problem,
)
from cached.plan import types as t
from cached.plan.ledger import Ledger
from cached.plan.state import Spot, is_gpu, is_moving, is_standing
from cached.plan.tick import Tick
from cached.plan.words import (
    ROOM_RETRY_S,
    gb,
    given_problem,
    name_of,
    no_tensors_problem,
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


class Memory:
    """The GPUs' memory in one tick, with what this tick has decided already."""

    def __init__(self, tick: Tick) -> None:
        self.tick = tick
        self.state = tick.state
        self.now = tick.now
        # What leases are given once they have room.
        self.awaited: dict[Spot, list[Claim]] = {}
        for claim in map(self.state.claims.__getitem__, self.state.ready):
            if claim.room is not None and claim.artifact is not None:
                spot = self.state.best(claim, claim.artifact), claim.artifact
                self.awaited.setdefault(spot, []).append(claim)
        self.residents: dict[Device, list[Spot]] = {}
        for spot in self.state.residencies:
            if is_gpu(spot[0]):
                self.residents.setdefault(spot[0], []).append(spot)

    # --- who has what -----------------------------------------------------------------------

    def connected(self) -> list[Device]:
        return [d for d, place in self.state.places.items() if is_gpu(d) and place.inventory is not None]

    def pins(self, spot: Spot) -> list[Claim]:
        claims = [*self.state.claims_on(*spot), *self.tick.placed.get(spot, ())]
        return [c for c in claims if c.kind is ClaimKind.PIN and c.id not in self.tick.ended]

    def leased(self, spot: Spot) -> bool:
        """Whether a lease holds it, or is about to."""
        claims = [*self.state.claims_on(*spot), *self.awaited.get(spot, ())]
        leases = (c for c in claims if c.kind is not ClaimKind.PIN and c.id not in self.tick.ended)
        return spot in self.tick.taken or next(leases, None) is not None

    def priority(self, spot: Spot) -> float:
        return max((pin.priority for pin in self.pins(spot)), default=float("-inf"))

    def may_leave(self, device: Device, below: float = float("inf")) -> list[Spot]:
        """Residents that no lease and no pin of such a priority holds; the first to leave first."""
        found = [
            spot
            for spot in self.residents.get(device, ())
            if self.state.residencies[spot].step is t.ResidentStep.RESIDENT
            and spot not in self.tick.released
            and not self.leased(spot)
            and self.priority(spot) < below
        ]
        return sorted(found, key=lambda spot: (self.priority(spot), self.tick.coldness(spot)))

    def tenant(self, device: Device) -> str | None:
        return (self.state.claimed_gpus or {}).get(device)

    def is_there(self, spot: Spot) -> bool:
        residency = self.state.residencies.get(spot)
        return spot in self.tick.begun or (residency is not None and is_standing(residency))

    def is_busy(self, device: Device) -> bool:
        residencies = [self.state.residencies[spot] for spot in self.residents.get(device, ())]
        loads = sum(r.step is t.ResidentStep.LOADING for r in residencies)
        releases = any(is_moving(r) for r in residencies) or any(s[0] == device for s in self.tick.released)
        return releases or loads >= self.state.load_slots

    # --- arithmetic -------------------------------------------------------------------------

    def settled(self, device: Device) -> bool:
        """Whether the figures are surely newer than what moved there last."""
        return self.now >= self.state.places[device].settles_at

    def free_bytes(self, device: Device) -> int:
        """What is surely free, but for loads under way."""
        place = self.state.places[device]
        assert place.inventory is not None
        free_bytes = place.inventory.gpu.free_bytes if place.inventory.gpu else 0
        return free_bytes - (0 if self.settled(device) else place.taken_bytes)

    def without(self, device: Device, leaves: Callable[[t.Residency], bool]) -> Ledger:
        """What the device counts without some of it."""
        ledger = self.state.places[device].ledger.draft()
        for spot in self.residents.get(device, ()):
            if leaves(self.state.residencies[spot]):
                ledger.remove(self.state.residencies[spot].items)
        return ledger

    def loading_bytes(self, device: Device) -> int:
        """What loads under way may still take."""
        without = self.without(device, lambda r: r.step is t.ResidentStep.LOADING)
        return self.state.places[device].ledger.used_bytes - without.used_bytes

    def fewest(
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

    def to_load(
        self, spot: Spot, leaving: list[Spot], spare_bytes: int, queued: Iterable[Spot] = ()
    ) -> list[Spot] | None:
        """Which of these have to leave so that it fits beside the rest, and beside what is ``queued``."""
        device, artifact = spot
        place, items = self.state.places[device], self.state.items_on(device, artifact)
        ledger = place.ledger.draft()
        for other in queued:
            ledger.add(self.state.items_on(*other))
        free_bytes = self.free_bytes(device) - self.loading_bytes(device) + place.ledger.used_bytes
        most_bytes = min(place.capacity_bytes, free_bytes - spare_bytes)
        return self.fewest(ledger, leaving, lambda d: d.used_bytes + d.missing_bytes(items) <= most_bytes)

    def spare_bytes(self, spot: Spot) -> int:
        """What must stay free beside it; more, where it had to leave before."""
        return self.state.rules.gpu_reserve_bytes * (2 if spot in self.state.thrown else 1)

    def given_back(self, device: Device, leaving: Iterable[Spot]) -> int:
        ledger = self.state.places[device].ledger.draft()
        for spot in leaving:
            ledger.remove(self.state.residencies[spot].items)
        return self.state.places[device].ledger.used_bytes - ledger.used_bytes

    # --- what stands against a load ---------------------------------------------------------

    def standing_problem(self, spot: Spot, pins: list[Claim]) -> Problem | None:
        """Why nothing of this may be loaded here, whatever room there is."""
        device, artifact = spot
        place = self.state.places[device]
        if place.unfit_reason:
            return unfit_problem(device, place)
        if not self.state.items_on(device, artifact):
            return no_tensors_problem(name_of(self.state, artifact), device)
        tenant = self.tenant(device)
        if tenant is None:
            return None if any(pin.unclaimed for pin in pins) else unclaimed_problem(device)
        since = max(self.state.claimed_since[device], *(pin.made_at for pin in pins))
        over = since + self.state.rules.claimed_grace_s <= self.now
        return given_problem(device, tenant) if over else None

    def pause_over_at(self, device: Device, pins: list[Claim]) -> float:
        """When older pins may be loaded here again, after something had to leave."""
        newest = max(pin.made_at for pin in pins)
        thrown = (x for spot, x in self.state.thrown.items() if spot[0] == device and x.at >= newest)
        return max((x.at + pause_s(x.times) for x in thrown), default=0.0)

    def thrown_problem(self, spot: Spot, pins: list[Claim]) -> Problem | None:
        until = self.pause_over_at(spot[0], pins)
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

    def no_room_to_load(self, spot: Spot, leaving: list[Spot]) -> Problem:
        device, artifact = spot
        place = self.state.places[device]
        need_bytes = sum(size for _, size in self.state.items_on(device, artifact))
        never = need_bytes > place.capacity_bytes
        return Problem(
            ErrorKind.NO_ROOM,
            "DEVICE_CAPACITY",
            f"{name_of(self.state, artifact)} needs {gb(need_bytes)} on {device}; the capacity is "
            f"{gb(place.capacity_bytes)}, {gb(self.free_bytes(device))} are free, of which "
            f"{gb(self.spare_bytes(spot))} stay so, and what may leave would give back "
            f"{gb(self.given_back(device, leaving))}" + self.holders(device, leaving),
            "use a larger device; replicas get it from the host meanwhile"
            if never
            else f"unpin or stop something on {device} ('cachectl ls' shows it), or pin this with a higher "
            "priority; replicas get it from the host meanwhile",
            None if never else ROOM_RETRY_S,
        )

    def unknown_problem(self, device: Device) -> Problem:
        known = ", ".join(self.connected()[:NAMED]) or "none"
        return Problem(
            ErrorKind.NOT_FOUND,
            "NO_SUCH_DEVICE",
            f"there is no GPU {device} here for room to be made on; connected: {known}",
            "name one of these; a container sees its own with nvidia-smi -L",
        )

    def holders(self, device: Device, leaving: Iterable[Spot]) -> str:
        """Who holds what may not leave."""
        stays = [s for s in self.residents.get(device, ()) if s not in set(leaving)]
        stays = [s for s in stays if self.state.residencies[s].items]
        words = [self._holder_words(spot) for spot in stays[:NAMED]]
        more = [f"{len(stays) - NAMED} more"] if len(stays) > NAMED else []
        return "; what stays there: " + ", ".join(words + more) if words else ""

    def _holder_words(self, spot: Spot) -> str:
        residency = self.state.residencies[spot]
        found = (c for c in self.state.claims_on(*spot) if c.id not in self.tick.ended)
        # Replicas are told, too, and do not see each other: who it is, `cachectl show` tells operators.
        claims = [f"a {c.kind.value}" for c in sorted(found, key=lambda c: c.kind is ClaimKind.PIN)]
        size = gb(sum(size for _, size in residency.items))
        why = residency.step.value if not claims else f"held by {claims[0]}"
        others = f" and {len(claims) - 1} more" if len(claims) > 1 else ""
        return f"{name_of(self.state, spot[1])} ({size}, {why}{others})"
