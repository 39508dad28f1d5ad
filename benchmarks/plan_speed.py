"""How long one tick of the planner takes on a full node: ``python benchmarks/plan_speed.py``.

Owns the workload and prints medians; asserts nothing. The aim is 1 ms a tick (its events worked in, plan,
and the actions applied as started) at 10,000 artifacts, 1,000 answered leases and four GPUs on which pins
and pools stand, evicting or not.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cached.model import (
    ANY_GPU,
    DISK,
    HOST,
    Artifact,
    Claim,
    ClaimId,
    ClaimKind,
    Device,
    Digest,
    FileSpec,
    Gpu,
    Inventory,
    Note,
    Ref,
    Resident,
    Revision,
    Room,
    artifact_id,
    revision_key,
)
from cached.plan import State, apply, plan
from cached.plan import types as t

AIM_MS = 1.0
BLOBS = 4
BLOB_BYTES = 4 * 10**9
RESIDENTS = 20
GPUS = [Device(f"cuda:GPU-{number}") for number in range(4)]
GPU_RESIDENTS = 8
GPU_BYTES = 140 * 10**9


def make_revision(number: int) -> Revision:
    """A model of four files, one of which it shares with nine others."""
    names = [f"shared-{number // 10}", *(f"{number}-{i}" for i in range(BLOBS - 1))]
    digests = [Digest(hashlib.sha256(name.encode()).hexdigest()) for name in names]
    files = tuple(FileSpec(f"{i}.safetensors", BLOB_BYTES, d) for i, d in enumerate(digests))
    ref = Ref(f"https://origin/{number}/")
    return Revision(ref, revision_key(ref, files), files)


def make_artifact(revision: Revision, at: float) -> Artifact:
    files = [(f.path, f.size_bytes, f.sha256 or "") for f in revision.files]
    blobs = tuple((Digest(d), size) for _, size, d in files)
    return Artifact(artifact_id(files), blobs, at, blobs)


class Node:
    """A full node: every artifact proven, leases answered on some of them, the disk full to the byte."""

    def __init__(self, artifacts: int, leases: int) -> None:
        self.state = State(fetch_slots=4, rules=t.Rules(high_watermark=1.0))
        self.now = 1e9
        self.made = 0
        self.revisions = [make_revision(i) for i in range(artifacts)]
        self.artifacts = [make_artifact(r, i) for i, r in enumerate(self.revisions)]
        notes = tuple(
            Note(r.ref, r.key, a.id, True, self.now)
            for r, a in zip(self.revisions, self.artifacts, strict=True)
        )
        # As much as they take at most: whatever that is, there is no level to drain to.
        self.happen(t.CapacitySet(DISK, artifacts * BLOBS * BLOB_BYTES))
        self.happen(t.Recovered(tuple(self.artifacts), notes, (), ()))
        self.happen(t.CapacitySet(DISK, self.state.disk.ledger.used_bytes))
        self.connect()
        for i in range(leases):
            # The coldest are claimed, so that looking for a victim has to pass them.
            self.claim(self.revisions[i % artifacts], ClaimKind.LEASE, HOST if i < RESIDENTS else DISK)
        self.tick()
        assert len(self.state.answered) == leases
        self.fill_gpus()

    def connect(self) -> None:
        residents = tuple(Resident(a.id, a.size_bytes, True) for a in self.artifacts[:RESIDENTS])
        limit_bytes = RESIDENTS * BLOBS * BLOB_BYTES
        inventory = Inventory(HOST, 1, limit_bytes, True, "", True, residents)
        self.happen(t.StandbySeen(inventory, limit_bytes))

    def fill_gpus(self) -> None:
        """Pins on each GPU, a pool of each, and pins that do not fit any more."""
        inventories = []
        for number, gpu in enumerate(GPUS):
            mine = self.artifacts[10 * number : 10 * number + GPU_RESIDENTS]
            held = tuple(Resident(a.id, a.size_bytes, True) for a in mine)
            figures = Gpu(number, "none", GPU_BYTES, GPU_BYTES - sum(a.size_bytes for a in mine))
            inventories.append(Inventory(gpu, 1, GPU_BYTES, True, "", True, held, figures))
            self.happen(t.StandbySeen(inventories[-1], GPU_BYTES - self.state.rules.gpu_reserve_bytes))
            for revision in self.revisions[10 * number : 10 * number + GPU_RESIDENTS + 2]:
                self.claim(revision, ClaimKind.PIN, gpu, unclaimed=True)
            self.claim(self.revisions[10 * number], ClaimKind.PIN, ANY_GPU, unclaimed=True, copies=2)
        self.inventories = inventories
        for _ in range(10):
            self.tick()

    def happen(self, event: t.Event) -> None:
        apply(self.state, event, self.now)

    def claim(self, revision: Revision, kind: ClaimKind, device: Device = DISK, **more: Any) -> ClaimId:
        self.made += 1
        claim_id = ClaimId(str(self.made))
        self.happen(t.ClaimMade(Claim(claim_id, kind, revision.ref, device, self.now, **more)))
        return claim_id

    def tick(self) -> list[t.Action]:
        actions = plan(self.state, self.now)
        for action in actions:
            self.happen(t.Started(action))
        return actions


def idle_tick(node: Node, round_: int) -> Callable[[], object]:
    return node.tick


def warm_acquire(node: Node, round_: int) -> Callable[[], object]:
    """A lease comes, is granted from the note, and ends."""

    def run() -> None:
        lease = node.claim(node.revisions[round_ % len(node.revisions)], ClaimKind.LEASE)
        node.tick()
        node.happen(t.ClaimEnded(lease))

    return run


def acquire_on_gpu(node: Node, round_: int) -> Callable[[], object]:
    """A lease comes that prefers four GPUs and wants room on one, is granted and ends."""
    room = Room(GPUS[0], 10**9)

    def run() -> None:
        lease = node.claim(node.revisions[round_ % 8], ClaimKind.LEASE, HOST, prefers=tuple(GPUS), room=room)
        node.tick()
        node.happen(t.ClaimEnded(lease))

    return run


def gpu_tells(node: Node, round_: int) -> Callable[[], object]:
    """A GPU's figures come anew."""
    gpu = node.inventories[round_ % 4].gpu
    assert gpu is not None

    def run() -> None:
        node.happen(t.GpuTold(GPUS[round_ % 4], gpu))
        node.tick()

    return run


def cold_resolve(node: Node, round_: int) -> Callable[[], object]:
    """A lease comes for what is not here and must be resolved."""

    def run() -> None:
        lease = node.claim(make_revision(10**6 + round_), ClaimKind.LEASE)
        node.tick()
        node.happen(t.ClaimEnded(lease))

    return run


def eviction(node: Node, round_: int) -> Callable[[], object]:
    """A cold model needs room on the full disk: the one that is missed least has to be found."""
    revision = make_revision(2 * 10**6 + round_)
    node.claim(revision, ClaimKind.PREFETCH)
    node.tick()
    node.happen(t.Resolved(revision))
    return node.tick


def after_eviction(node: Node) -> None:
    """Let the eviction end, and give the new model's room up again."""
    for artifact in [a for a, p in node.state.artifacts.items() if p.step is t.DiskStep.EVICTING]:
        node.happen(t.Evicted(artifact))
    for claim in [c.id for c in node.state.claims.values() if c.kind is ClaimKind.PREFETCH]:
        node.happen(t.ClaimEnded(claim))
    node.happen(t.CapacitySet(DISK, node.state.disk.ledger.used_bytes))


def standby_tells(node: Node, round_: int) -> Callable[[], object]:
    """The standby tells its residents again."""

    def run() -> None:
        node.connect()
        node.tick()

    return run


CASES = (idle_tick, warm_acquire, acquire_on_gpu, gpu_tells, cold_resolve, standby_tells, eviction)


def median_ms(node: Node, case: Callable[[Node, int], Callable[[], object]], rounds: int) -> float:
    took_ms = []
    for round_ in range(rounds):
        run = case(node, round_)
        began = time.perf_counter()
        run()
        took_ms.append((time.perf_counter() - began) * 1e3)
        if case is eviction:
            after_eviction(node)
    return statistics.median(took_ms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--artifacts", type=int, default=10_000)
    parser.add_argument("--leases", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    node = Node(options.artifacts, options.leases)
    print(f"{options.artifacts} artifacts, {options.leases} leases, 4 GPUs; the aim is {AIM_MS} ms a tick")
    for case in CASES:
        print(f"{case.__name__.replace('_', ' '):<15} {median_ms(node, case, options.rounds):8.3f} ms")


if __name__ == "__main__":
    main()
