"""The simulated node with two GPUs, whose memory others take too, and an orchestrator that gives them away.

Owns the truth about these devices, as plan_world does about the rest; what the planner was told of it may be
older than the truth, as it is on a node. No I/O, no clock.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace

from plan_world import PERMANENT, START, TEMPORARY, World, union_bytes
from plan_world import RULES as DISK_RULES

from cached.model import (
    ANY_GPU,
    EVERY_GPU,
    HOST,
    ArtifactId,
    Claim,
    ClaimKind,
    Device,
    ErrorKind,
    Gpu,
    Inventory,
    Problem,
    Resident,
)
from cached.plan import is_gpu
from cached.plan import types as t
from cached.plan.memory import FIRST_PAUSE_S

X, Y = Device("cuda:GPU-x"), Device("cuda:GPU-y")
TOTAL_BYTES = 100
RESERVE_BYTES = 5
RULES = replace(DISK_RULES, gpu_reserve_bytes=RESERVE_BYTES)
HELD = Problem(ErrorKind.UNAVAILABLE, "HELD_OUTSIDE", "somebody has it mapped", "stop it", 5.0)


class GpuWorld(World):
    def __init__(self, keep_leftovers: bool = True, rules: t.Rules = RULES) -> None:
        # Memory that others take, what is wrong with a device, and both as the daemon was last told.
        self.others: Counter[Device] = Counter()
        self.unfit: dict[Device, str] = defaultdict(str)
        self.told_others: Counter[Device] = Counter()
        self.told_unfit: dict[Device, str] = defaultdict(str)
        self.outside: set[tuple[Device, ArtifactId]] = set()
        self.given: dict[Device, str] | None = None
        self.given_at: dict[Device, float] = {}
        self.thrown_at: dict[tuple[Device, ArtifactId], float] = {}
        self.loads: Counter[tuple[Device, ArtifactId]] = Counter()
        self.prompt = False
        super().__init__(keep_leftovers, rules, disk_bytes=1000)

    # --- what happens -----------------------------------------------------------------------

    def connect(self) -> None:
        super().connect()
        for device in (X, Y):
            self.see_standby(device=device)

    def restart(self) -> None:
        self.outside.clear()
        self.thrown_at.clear()
        super().restart()
        if self.given is not None:
            self.happen(t.GpusClaimed(self.given))
            self.given_at = dict.fromkeys(self.given, 0.0)

    def tick(self) -> None:
        if self.prompt:
            self.tell()
        super().tick()
        self.check_gpus()

    def tell(self) -> None:
        """The figures come anew."""
        for device in self.connected - {HOST}:
            self.happen(t.GpuTold(device, self.figures(device)))

    def figures(self, device: Device) -> Gpu:
        self.told_others[device], self.told_unfit[device] = self.others[device], self.unfit[device]
        free_bytes = max(0, TOTAL_BYTES - self.others[device] - self.used_bytes(device))
        return Gpu(0, "labelled fake", TOTAL_BYTES, free_bytes, 0, self.unfit[device])

    def give(self, by: dict[Device, str]) -> None:
        """The orchestrator tells whom it has given the GPUs to."""
        before = self.given
        for device in by:
            if before is None or before.get(device) != by[device]:
                self.given_at[device] = self.now if before is not None else 0.0
        self.given = by
        self.happen(t.GpusClaimed(by))

    def inventory(self, device: Device, residents: tuple[Resident, ...]) -> Inventory:
        told = super().inventory(device, residents)
        return replace(told, gpu=self.figures(device)) if is_gpu(device) else told

    def room_of(self, device: Device) -> int:
        return TOTAL_BYTES - RESERVE_BYTES if is_gpu(device) else super().room_of(device)

    def lose_standby(self, died: bool, late: bool, device: Device = HOST) -> None:
        super().lose_standby(died, late, device)
        self.outside = {spot for spot in self.outside if spot[0] != device}

    def finish_load(self, device: Device, artifact: ArtifactId, problem: Problem | None) -> None:
        if is_gpu(device) and problem is None:
            need = union_bytes([*self.standing_on(device), self.items_of(device, artifact)])
            problem = TEMPORARY if need + self.others[device] > TOTAL_BYTES else None
        super().finish_load(device, artifact, problem)

    def finish_release(self, device: Device, artifact: ArtifactId, problem: Problem | None) -> None:
        if problem is TEMPORARY and is_gpu(device):
            self.outside.add((device, artifact))
            self.works.append(t.Release(device, artifact, "it is still held"))
            self.happen(t.HeldOutside(device, artifact, HELD))
            return
        self.outside.discard((device, artifact))
        super().finish_release(device, artifact, problem)

    # --- counted anew -----------------------------------------------------------------------

    def items_of(self, device: Device, artifact: ArtifactId) -> dict[str, int]:
        if not is_gpu(device):
            return super().items_of(device, artifact)
        proven = self.state.artifacts.get(artifact)
        return dict(proven.artifact.images) if proven else {}

    def held_items(self, device: Device, artifact: ArtifactId) -> dict[str, int]:
        return dict(self.sizes[artifact].images) if is_gpu(device) else super().held_items(device, artifact)

    def standing_on(self, device: Device, but: Iterable[ArtifactId] = ()) -> list[dict[str, int]]:
        loading = [w.artifact for w in self.calls(device) if isinstance(w, t.Load)]
        held = [self.held_items(device, a) for a in self.memory[device] if a not in but]
        return held + [self.items_of(device, a) for a in loading]

    def used_bytes(self, device: Device) -> int:
        return union_bytes(self.standing_on(device))

    def has_resident(self, artifact: ArtifactId) -> bool:
        held = [d for d in self.connected if artifact in self.memory[d]]
        return any((device, artifact) not in self.outside for device in held)

    def leased(self, device: Device, artifact: ArtifactId) -> bool:
        """Whether a lease holds it, or is to be given it once there is room."""
        claims = [c for c in self.claims_of(artifact) if c.kind is not ClaimKind.PIN]
        return device in {d for c in claims for d in (c.device, self.first_of(c, artifact))}

    def first_of(self, claim: Claim, artifact: ArtifactId) -> Device:
        waits = claim.room is not None and claim.id not in self.state.answered
        prefers = claim.prefers if waits else ()
        return next((d for d in prefers if self.gives(d, artifact)), claim.device)

    def pins(self, device: Device, artifact: ArtifactId) -> list[Claim]:
        claims = self.claims_of(artifact)
        return [c for c in claims if c.kind is ClaimKind.PIN and c.device == device]

    def priority(self, device: Device, artifact: ArtifactId) -> float:
        return max((pin.priority for pin in self.pins(device, artifact)), default=float("-inf"))

    def starting(self, device: Device) -> list[Claim]:
        """Leases whose holder starts there."""
        claims = [self.state.claims[c] for c, until in self.state.starting.items() if until > self.now]
        return [c for c in claims if c.room is not None and c.room.device == device]

    def allowed(self, device: Device, pins: list[Claim]) -> bool:
        if self.given is None or device not in self.given:
            return any(pin.unclaimed for pin in pins)
        since = max(self.given_at[device], *(pin.made_at for pin in pins))
        return self.now < since + self.rules.claimed_grace_s

    def cannot_fit(self, claim: Claim, problem: Problem) -> bool:
        # Who waits for a pool hears what was last said of one of its copies.
        of_a_copy = problem.reason == "DEVICE_CAPACITY" and claim.device in (ANY_GPU, EVERY_GPU)
        return of_a_copy or super().cannot_fit(claim, problem)

    def fits_in_memory(self, device: Device, artifact: ArtifactId, priority: int) -> bool:
        """Whether it fits beside what may not leave for it."""
        if not is_gpu(device):
            return super().fits_in_memory(device, artifact, priority)
        mine = max(priority, self.priority(device, artifact))
        stays = [self.items_of(device, artifact)]
        for (d, other), residency in self.state.residencies.items():
            may_leave = residency.step is t.ResidentStep.RESIDENT and self.priority(d, other) < mine
            if d == device and other != artifact and (not may_leave or self.leased(d, other)):
                stays.append(dict(residency.items))
        spare = RESERVE_BYTES * (2 if (device, artifact) in self.state.thrown else 1)
        return union_bytes(stays) + max(RESERVE_BYTES, self.told_others[device] + spare) <= TOTAL_BYTES

    # --- what must hold of an action --------------------------------------------------------

    def check_action(self, action: t.Action) -> None:
        super().check_action(action)
        match action:
            case t.Load(device, artifact) if is_gpu(device):
                self.check_load(device, artifact)
                self.loads[device, artifact] += 1
            case t.Release(device, artifact) if action.thrown:
                self.thrown_at[device, artifact] = self.now
            case _:
                pass

    def check_load(self, device: Device, artifact: ArtifactId) -> None:
        pins, items = self.pins(device, artifact), self.items_of(device, artifact)
        assert pins and items, "loads what no pin wants there, or what has no tensors"
        assert not self.told_unfit[device] and self.allowed(device, pins)
        assert not self.starting(device), "loads beside an engine that starts"
        union = union_bytes([*self.standing_on(device), items])
        assert self.told_others[device] + union + RESERVE_BYTES <= TOTAL_BYTES, "there is no room"
        newest = max(pin.made_at for pin in pins)
        at = max((x for spot, x in self.thrown_at.items() if spot[0] == device and x >= newest), default=0.0)
        assert self.now >= at + FIRST_PAUSE_S, "it was thrown out a moment ago"

    def check_release(self, device: Device, artifact: ArtifactId) -> None:
        if not is_gpu(device):
            super().check_release(device, artifact)
            return
        assert not self.leased(device, artifact), "releases what is leased"

    def check_grant(self, claim: Claim, device: Device) -> None:
        super().check_grant(claim, device)
        assert claim.artifact is not None
        for better in claim.prefers:
            if better == device:
                break
            fit = not is_gpu(better) or not self.told_unfit[better]
            assert not (self.stands(better, claim.artifact) and fit), "there is one that he prefers"
        if is_gpu(device):
            assert not self.told_unfit[device]
        if claim.room is not None:
            room = claim.room
            promised = sum(c.room.size_bytes for c in self.starting(room.device) if c.room)
            taken = self.told_others[room.device] + self.used_bytes(room.device) + promised
            assert taken + room.size_bytes <= TOTAL_BYTES, "the room is not there"

    def check_refusal(self, claim: Claim, problem: Problem) -> None:
        super().check_refusal(claim, problem)
        room, artifact = claim.room, claim.artifact
        match problem.reason:
            case "NO_ROOM":
                assert room is not None
                kept = [
                    self.held_items(room.device, a)
                    for a in self.memory[room.device]
                    if self.leased(room.device, a)
                    or (room.device, a) in self.outside
                    or (a == artifact and room.device in (claim.device, *claim.prefers))
                ]
                left = TOTAL_BYTES - self.told_others[room.device] - union_bytes(kept)
                assert left < room.size_bytes, f"there could be room: {problem.message}"
            case "NOT_PINNED":
                assert artifact is not None and not self.pins(claim.device, artifact)
            case "NO_SUCH_DEVICE":
                assert room is not None and room.device not in self.connected
            case "GPU_UNFIT":
                wanted = {claim.device, *self.rooms_of(claim)}
                unfit = {d for d in (X, Y) if self.told_unfit[d]}
                assert unfit & wanted or claim.device in (ANY_GPU, EVERY_GPU)
            case "UNCLAIMED_GPU":
                assert artifact is not None
                assert not all(pin.unclaimed for pin in self.pins(claim.device, artifact))
            case _:
                pass

    # --- what must hold at rest -------------------------------------------------------------

    def gives(self, device: Device, artifact: ArtifactId) -> bool:
        return super().gives(device, artifact) and not (is_gpu(device) and self.told_unfit[device])

    def check_gpus(self) -> None:
        state = self.state
        for member_id, pool_id in state.members.items():
            member, pool = state.claims[member_id], state.claims[pool_id]
            assert member_id == f"{pool_id}/{member.device}"
            assert replace(member, id=pool.id, device=pool.device) == pool
        for device in self.connected - {HOST}:
            moving = [w for w in self.calls(device) if isinstance(w, t.Release)]
            moving = [w for w in moving if (device, w.artifact) not in self.outside]
            place = state.places[device]
            if (
                moving
                or self.now < place.settles_at
                or place.inventory is None
                or place.inventory.gpu is None
            ):
                continue
            here = [a for d, a in state.residencies if d == device and state.is_resident(d, a)]
            idle = [a for a in here if not self.leased(device, a)]
            if place.inventory.gpu.free_bytes < RESERVE_BYTES or self.told_unfit[device]:
                assert not idle, "it stays, and the memory is short or the device unfit"
            room_awaited = any(c.room and c.room.device == device for c in state.claims.values())
            for artifact in idle if not room_awaited else ():
                self.check_stays(device, artifact)

    def check_stays(self, device: Device, artifact: ArtifactId) -> None:
        residency = self.state.residencies[device, artifact]
        tenant = (self.given or {}).get(device)
        since = max(
            residency.since, residency.last_used_at, self.given_at.get(device, 0.0) if tenant else 0.0
        )
        lately = self.now < since + self.rules.claimed_grace_s
        pinned = any(pin.unclaimed for pin in self.pins(device, artifact))
        assert lately or (tenant is None and pinned), "it outstays"

    # --- the end ----------------------------------------------------------------------------

    def mend(self) -> None:
        """Nobody else takes memory any more, and the GPUs are fit and given to nobody."""
        super().mend()
        self.prompt = True
        self.others.clear()
        self.unfit.clear()
        for device in (X, Y):
            if device not in self.connected:
                self.see_standby(device=device)
        if self.given:
            self.give({})
        self.tell()
        self.loads.clear()

    def check_met(self) -> None:
        super().check_met()
        assert all(count <= 2 for count in self.loads.values()), f"thrash: {self.loads}"
        for pool in [self.state.claims[c] for c in self.state.pools]:
            assert pool.artifact is not None
            placed = {self.state.claims[m].device for m, p in self.state.members.items() if p == pool.id}
            want = 2 if pool.device == EVERY_GPU else pool.copies
            problem = self.state.residencies.get((pool.device, pool.artifact))
            assert len(placed) == want or problem is not None, "nothing says why copies are missing"
            for device in {X, Y} - placed if len(placed) < want else ():
                could = self.allowed(device, [pool]) and self.items_of(device, pool.artifact)
                fits = self.fits_in_memory(device, pool.artifact, pool.priority)
                told = self.state.residencies.get((device, pool.artifact))
                failed = told is not None and told.problem == PERMANENT
                assert not (could and fits) or failed, f"{pool} could have a copy on {device}"

    def check_problem(self, pin: Claim, problem: Problem) -> None:
        assert pin.artifact is not None or not is_gpu(pin.device) or problem
        if problem.reason == "NO_TENSORS":
            assert pin.artifact is not None and not self.items_of(pin.device, pin.artifact)
        elif problem.reason == "UNCLAIMED_GPU":
            assert pin.artifact is not None
            assert not any(p.unclaimed for p in self.pins(pin.device, pin.artifact))
        else:
            super().check_problem(pin, problem)


__all__ = ["HELD", "RULES", "START", "GpuWorld", "X", "Y"]
