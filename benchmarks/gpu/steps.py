"""The steps, each on a node of its own over the same store, so that none goes on with what another left.

Owns what is looked at, and what has to be so: that is checked, while no figure in seconds is. A step says its
figures as it goes and raises StepFailed where something is not as it has to be.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median
from typing import Any, Protocol

from benchmarks.gpu.stage import Node, Replica, Stage, StepFailed, Stored, pss_mib, read_bytes
from benchmarks.handoff.models import bring_in

LIMIT_BYTES = 4 * 10**9
"""Of the model's files, for what the disk and the page cache give."""
SETTLE_S = 1.0
IDLE_S = 60.0
LOOK_S = 0.05


class Say(Protocol):
    def __call__(self, what: str, **figures: Any) -> None: ...


def check(right: bool, why: str) -> None:
    if not right:
        raise StepFailed(why)


def ratio(one: float, other: float | None) -> float | None:
    return one / other if other else None


# --- (1) to (3): limits and loads -------------------------------------------------------------


def limits(stage: Stage, say: Say) -> None:
    with stage.node() as node, stage.model(node, stage.wanted.gb) as model:
        say("model", gb=model.size_bytes / 1e9, tensors=model.tensors, files=len(model.files))
    files, taken = [], 0
    for file in model.files:
        if taken < LIMIT_BYTES:
            files.append(file)
            taken += file.stat().st_size
    lines = stage.python("benchmarks.gpu.limits", model.size_bytes, stage.wanted.rounds, *files)
    for line in lines:
        stage.rates[line["what"]] = line["gb_s"]
        say(**line)


def load(stage: Stage, say: Say) -> None:
    """Without a daemon: it would keep what is to be released."""
    with stage.node() as node, stage.model(node, stage.wanted.gb) as model:
        pass
    with stage.preloader():
        arguments = (model.folder, model.id, stage.device, stage.wanted.rounds)
        found = stage.tell("loads", *arguments)
    copy, disk = stage.rates.get("copy"), stage.rates.get("disk")
    limit_of = {"disk_s": min(copy, disk) if copy and disk else None, "host_s": copy}
    for name, limit in limit_of.items():
        rates = [found["bytes"] / 1e9 / took_s for took_s in found[name]]
        source = "the disk" if name == "disk_s" else "the host's pages"
        say(f"from {source}", gb_s=median(rates), all=rates, of_limit=ratio(median(rates), limit))
    say("released", s=median(found["release_s"]))


# --- (4) to (6): replicas ---------------------------------------------------------------------


def handoff(stage: Stage, say: Say) -> None:
    failed = []
    for gb in stage.wanted.sizes:
        try:
            with stage.node() as node, stage.model(node, gb) as model:
                handoff_of(stage, say, model)
        except StepFailed as error:
            say(f"{gb:g} GB", error=str(error))
            failed.append(gb)
    check(not failed, f"not handed over: {', '.join(f'{gb:g} GB' for gb in failed)}")


def handoff_of(stage: Stage, say: Say, model: Stored) -> None:
    what = f"{model.size_bytes / 1e9:.2f} GB, {model.tensors} tensors"
    say(f"{what}: pinned", s=stage.tell("pin", model.ref, stage.device)["s"])
    ours: list[dict[str, Any]] = []
    for number in range(stage.wanted.rounds):
        with stage.replica(model) as replica:
            ours.append(replica.load())
            check(ours[-1]["from"] == stage.device, f"it came from {ours[-1]['from']}")
            if not number:
                check(replica.digest() == digest_on_disk(stage, model), "other bytes than on the disk")
    names = ("exchange_s", "mapping_s", "tensors_s", "complete_s", "kernel_s")
    figures = {name: median(took[name] for took in ours) for name in names}
    say(f"{what}: handed over", **figures)
    bring_in(model.files)
    theirs = []
    for _ in range(stage.wanted.rounds):
        with stage.replica(model, "safetensors") as replica:
            theirs.append(replica.load()["complete_s"])
    times = median(theirs) / figures["complete_s"]
    say(f"{what}: safetensors' load_file, warm", complete_s=median(theirs), times_ours=times)


def digest_on_disk(stage: Stage, model: Stored) -> str:
    if model.id not in stage.digests:
        with stage.replica(model, "disk") as replica:
            replica.load()
            stage.digests[model.id] = replica.digest()
    return stage.digests[model.id]


def streaming(stage: Stage, say: Say) -> None:
    """Where it does not stand on the GPU, from the host's pages into memory of the replica's own."""
    with stage.node() as node, stage.model(node, stage.wanted.gb) as model:
        stage.tell("pin", model.ref, "host")
        took = []
        for _ in range(stage.wanted.rounds):
            with stage.replica(model) as replica:
                took.append(replica.load())
                check(bool(took[-1]["streamed"]), f"it was not streamed, but came from {took[-1]['from']}")
                digest = replica.digest()
        check(digest == digest_on_disk(stage, model), "other bytes than on the disk")
    rates = [model.size_bytes / 1e9 / each["complete_s"] for each in took]
    of_copy = ratio(median(rates), stage.rates.get("copy"))
    say("from the host's pages", gb_s=median(rates), all=rates, of_copy=of_copy)


def sharing(stage: Stage, say: Say) -> None:
    with stage.node() as node, stage.model(node, stage.wanted.gb) as model:
        stage.tell("pin", model.ref, stage.device)
        wait_idle(node)
        with stage.replica(model) as one, stage.replica(model) as other:
            one.ready(), other.ready()
            contexts = stage.used_bytes()
            digests = []
            for number, replica in enumerate((one, other), 1):
                replica.begin()
                replica.loaded()
                digests.append(replica.digest())
                grown = stage.used_bytes() - contexts
                say(f"{number} replica(s)", grown_mib=grown / 2**20, model_mib=model.size_bytes / 2**20)
            check(digests[0] == digests[1], "they see different bytes")
            check(grown < model.size_bytes // 2, "each has memory of its own")


def crowd(stage: Stage, say: Say) -> None:
    few, many = stage.wanted.crowds
    with stage.node() as node, stage.model(node, stage.wanted.gb) as model, ExitStack() as replicas:
        stage.tell("pin", model.ref, stage.device)
        took = stage.tell("exchange", model.ref, stage.device, many)["took_s"]
        say(f"{many} at once, not mapped", **percentiles(took))
        all_ = [replicas.enter_context(stage.replica(model)) for _ in range(few)]
        for replica in all_:
            replica.ready()
        for replica in all_:
            replica.begin()
        took = [replica.loaded()["complete_s"] for replica in all_]
        say(f"{few} at once, with contexts, to the state dict", **percentiles(took))


def percentiles(took_s: list[float]) -> dict[str, float]:
    ordered = sorted(took_s)
    return {"p50_s": median(ordered), "p99_s": ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]}


# --- (7): what dies -------------------------------------------------------------------------


def crash(stage: Stage, say: Say) -> None:
    failed = []
    for name, case in CASES.items():
        try:
            with stage.node() as node, stage.model(node, stage.wanted.gb) as model:
                case(stage, node, model, lambda name=name, **figures: say(name, **figures))
        except StepFailed as error:
            say(name, error=str(error))
            failed.append(name)
    check(not failed, f"failed: {', '.join(failed)}")


Case = Callable[[Stage, Node, Stored, Callable[..., None]], None]


def filler_killed(stage: Stage, node: Node, model: Stored, say: Callable[..., None]) -> None:
    """Midway: the load begins again, and what it brings is right."""
    wait_idle(node)
    with stage.slowly(), stage.telling("pin", model.ref, stage.device) as lines:
        killed_at = kill_filler(node, model.size_bytes // 4)
        *_, last = lines
    check("error" not in last, f"the pin failed: {last.get('error')}")
    check(bool(node.events("filler ended")), "the load was over before it could be hit")
    handed_out(stage, model)
    say(killed_at=killed_at / model.size_bytes, loaded_s=last["s"])


def kill_filler(node: Node, after_bytes: int) -> int:
    """Once it has read so much, imports included; how much it was."""
    until = time.monotonic() + IDLE_S
    while time.monotonic() < until:
        pid = node.filler()
        read = read_bytes(pid) if pid is not None else 0
        if pid is not None and read >= after_bytes:
            os.kill(pid, signal.SIGKILL)
            return read
    raise StepFailed(f"no filler had read {after_bytes} bytes within {IDLE_S:.0f} s")


def then(*events: Callable[[Node], None], held: bool = True) -> Case:
    """A case in which something is killed or replaced once the model stands, ``held`` by a replica or not."""

    def case(stage: Stage, node: Node, model: Stored, say: Callable[..., None]) -> None:
        stage.tell("pin", model.ref, stage.device)
        with ExitStack() as stack:
            holder: Replica | None = stack.enter_context(stage.replica(model)) if held else None
            if holder is not None:
                holder.load()
            loads = node.loads()
            for event in events:
                began = time.monotonic()
                event(node)
                stage.tell("until", model.ref, stage.device)
                say(again_s=time.monotonic() - began)
            if holder is not None:
                check(holder.digest() == digest_on_disk(stage, model), "the holder sees other bytes")
            handed_out(stage, model)
            check(node.loads() == loads, f"it was loaded anew {node.loads() - loads} times")

    return case


def handed_out(stage: Stage, model: Stored) -> None:
    """To a fresh replica, from the GPU, with the right bytes."""
    with stage.replica(model) as fresh:
        origin = fresh.load()["from"]
        check(origin == stage.device, f"a fresh replica has it from {origin}")
        check(fresh.digest() == digest_on_disk(stage, model), "a fresh replica sees other bytes")


def preloader_killed(node: Node) -> None:
    node.kill("preloader")
    node.start_preloader()


def daemon_killed(node: Node) -> None:
    node.kill("daemon")
    node.start_daemon()


def preloader_replaced(node: Node) -> None:
    node.stop("preloader")
    node.start_preloader()


def daemon_replaced(node: Node) -> None:
    node.stop("daemon")
    node.start_daemon()


def unpinned(stage: Stage, node: Node, model: Stored, say: Callable[..., None]) -> None:
    before = stage.used_bytes()
    stage.tell("pin", model.ref, stage.device)
    check(stage.used_bytes() >= before + model.size_bytes, "the device does not show its memory as used")
    began = time.monotonic()
    stage.tell("unpin")
    found = stage.tell("gone", stage.device, before + model.size_bytes // 10)
    say(s=time.monotonic() - began, left_mib=(found["used_bytes"] - before) / 2**20)


CASES: dict[str, Case] = {
    "filler killed midway": filler_killed,
    "preloader killed": then(preloader_killed),
    "daemon killed": then(daemon_killed),
    "preloader killed, then the daemon": then(preloader_killed, daemon_killed),
    "the same, nobody has it mapped": then(preloader_killed, daemon_killed, held=False),
    "both upgraded, preloader first": then(preloader_replaced, daemon_replaced, held=False),
    "both upgraded, daemon first": then(daemon_replaced, preloader_replaced, held=False),
    "memory is free once unpinned": unpinned,
}


# --- (8) and (9): idle, and room ----------------------------------------------------------------


def idle(stage: Stage, say: Say) -> None:
    before = stage.used_bytes()
    with stage.node() as node, stage.model(node, stage.wanted.gb) as model:
        time.sleep(SETTLE_S)
        costs(node, say, "nothing resident")
        say("GPU memory, nothing resident", mib=(stage.used_bytes() - before) / 2**20)
        stage.tell("pin", model.ref, stage.device)
        loaded = (stage.used_bytes() - before - model.size_bytes) / 2**20
        ended_s = wait_idle(node)
        left = (stage.used_bytes() - before - model.size_bytes) / 2**20
        say("GPU memory beside the model", loaded_mib=loaded, idle_mib=left, until_filler_gone_s=ended_s)
        costs(node, say, "one resident")


def wait_idle(node: Node) -> float:
    """Seconds until no filler is there any more."""
    began = time.monotonic()
    while node.filler() is not None:
        check(time.monotonic() < began + IDLE_S, f"the filler was still there after {IDLE_S:.0f} s")
        time.sleep(LOOK_S)
    return time.monotonic() - began


def costs(node: Node, say: Say, what: str) -> None:
    for pid, name in node.pids().items():
        if name != "(ended)":
            say(f"{what}: {name}", **pss_mib(pid))


def room(stage: Stage, say: Say) -> None:
    """An engine asks for more than is free beside an idle model."""
    total = stage.tell("devices", stage.uuid)["total_bytes"]
    with stage.node() as node, stage.model(node, stage.wanted.gb) as model:
        stage.tell("pin", model.ref, stage.device)
        free = stage.tell("devices", stage.uuid)["free_bytes"]
        wanted = free + model.size_bytes // 2
        found = stage.tell("room", model.ref, wanted, stage.device)
        say("granted", s=found["granted_s"], wanted_gb=wanted / 1e9, total_gb=total / 1e9)
        check(found["free_bytes"] >= wanted, f"{found['free_bytes']} bytes were free, not {wanted}")


STEPS: dict[str, Callable[[Stage, Say], None]] = {
    "limits": limits,
    "load": load,
    "handoff": handoff,
    "streaming": streaming,
    "sharing": sharing,
    "crash": crash,
    "idle": idle,
    "room": room,
    "crowd": crowd,
}
