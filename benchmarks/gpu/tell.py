"""What is asked of the node, of its standbys and of NVML, each time in a process of its own.

``python -m benchmarks.gpu.tell WORD ARGUMENT…`` prints JSON lines; the last one is the answer, or what went
wrong. The benchmark itself neither imports gRPC, for it forks, nor NVML, which keeps the device's node open.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TIMEOUT_S = 300.0
POLL_S = 0.01
Answer = dict[str, Any]


def say(answer: Answer) -> None:
    print(json.dumps(answer), flush=True)


# --- the daemon -----------------------------------------------------------------------------


@contextmanager
def operators() -> Iterator[tuple[Any, Any]]:
    """Both services, as operators have them."""
    import grpc

    from cached.v1.model_cache_pb2_grpc import ModelCacheStub
    from cached.v1.operator_pb2_grpc import OperatorStub

    with grpc.insecure_channel(f"unix:{os.environ['CACHED_RUN_DIR']}/cached.sock") as channel:
        yield OperatorStub(channel), ModelCacheStub(channel)


def followed(call: Any) -> Answer:
    """A claim's events; each progress is told as it comes."""
    began = time.monotonic()
    for event in call:
        if event.WhichOneof("event") == "progress":
            say({"phase": event.progress.phase, "done_bytes": event.progress.bytes_done})
    return {"id": event.done.id, "folder": event.done.path, "s": time.monotonic() - began}


def prefetch(ref: str) -> Answer:
    from cached.v1 import operator_pb2 as pb

    with operators() as (operator, _):
        return followed(operator.Prefetch(pb.PrefetchRequest(ref=ref, wait=True), timeout=TIMEOUT_S))


def pin(ref: str, device: str) -> Answer:
    from cached.v1 import operator_pb2 as pb

    with operators() as (operator, _):
        request = pb.PinRequest(ref=ref, device=device, wait=True, unclaimed=device.startswith("cuda:"))
        return followed(operator.Pin(request, timeout=TIMEOUT_S))


def unpin() -> Answer:
    """Take off all pins."""
    from cached.v1 import model_cache_pb2, operator_pb2

    with operators() as (operator, cache):
        listed = cache.List(model_cache_pb2.ListRequest(), timeout=TIMEOUT_S).models
        pinned = [model.ref for model in listed if any(claim.kind == "pin" for claim in model.claims)]
        for ref in pinned:
            operator.Unpin(operator_pb2.UnpinRequest(ref=ref), timeout=TIMEOUT_S)
    return {"unpinned": len(pinned)}


def evict(ref: str) -> Answer:
    from cached.v1 import operator_pb2 as pb

    with operators() as (operator, _):
        return {"freed_bytes": operator.Evict(pb.EvictRequest(ref=ref), timeout=TIMEOUT_S).freed_bytes}


def until(ref: str, device: str) -> Answer:
    """Wait until it is resident there, over daemons that come and go."""
    import grpc

    from cached.v1 import model_cache_pb2 as pb

    began = time.monotonic()
    while time.monotonic() < began + TIMEOUT_S:
        try:
            with operators() as (_, cache):
                while True:
                    model = cache.Get(pb.GetRequest(ref=ref), timeout=1)
                    found = {residency.device: residency.state for residency in model.residencies}
                    if found.get(device) == "resident":
                        return {"s": time.monotonic() - began}
                    time.sleep(POLL_S)
        except grpc.RpcError:
            time.sleep(POLL_S)
    raise TimeoutError(f"{ref} did not come to stand on {device}")


def empty(device: str) -> Answer:
    """Wait until nothing stands on the device any more."""
    from cached.v1 import model_cache_pb2 as pb

    began = time.monotonic()
    with operators() as (_, cache):
        while time.monotonic() < began + TIMEOUT_S:
            models = cache.List(pb.ListRequest(), timeout=TIMEOUT_S).models
            states = [r.state for m in models for r in m.residencies if r.device == device]
            if not states:
                return {"s": time.monotonic() - began}
            time.sleep(POLL_S)
    raise TimeoutError(f"{states} still stand on {device}")


def room(ref: str, room_bytes: str, device: str) -> Answer:
    """An engine that takes ``ref`` from the disk and wants room on its GPU; then it is ready."""
    import cached
    from cached.client import granting  # noqa: F401  gRPC is imported with it

    began = time.monotonic()
    with cached.acquire(ref, room_bytes=int(room_bytes), room_on=device, timeout_s=TIMEOUT_S) as model:
        granted_s = time.monotonic() - began
        free_bytes = devices(device)["free_bytes"]
        model.ready()
    return {"granted_s": granted_s, "free_bytes": free_bytes}


def exchange(ref: str, device: str, count: str) -> Answer:
    """So many processes take the model's memory at once and do not map it; each one's seconds."""
    from benchmarks.handoff.crowd import crowd
    from cached.client import granting, handoff, rpc
    from cached.client.devices import Wish
    from cached.client.stopping import Stop

    def take() -> tuple[dict[str, Any], float]:
        address, began = rpc.resolve_address(), time.monotonic()
        request = granting.make_request(ref, Wish("host", (device,)), False, os.environ)
        grant = granting.wait_for_grant(address, request, TIMEOUT_S, lambda progress: None, Stop())
        taken = handoff.redeem(rpc.handoff_path(address), grant.token, TIMEOUT_S)
        return ({"fds": taken.memory_fds} if grant.device == device else {}), time.monotonic() - began

    return {"took_s": crowd(take, int(count))}


# --- the standbys, without a daemon -----------------------------------------------------------


def loads(folder: str, artifact: str, device: str, rounds: str) -> Answer:
    """Seconds of each load onto the device: with nothing in memory, and from the host's pages."""
    return asyncio.run(_loads(sorted(Path(folder).glob("*.safetensors")), artifact, device, int(rounds)))


async def _loads(files: list[Path], artifact: str, device: str, rounds: int) -> Answer:
    from benchmarks.handoff.models import give_up
    from cached.model import HOST, ArtifactId, Device
    from cached.standby import Standby

    id, sockets = ArtifactId(artifact), Path(os.environ["CACHED_RUN_DIR"]) / "standby"
    gpu = Standby(Device(device), sockets / f"{device.replace(':', '-', 1)}.sock")
    host = Standby(HOST, sockets / "host.sock")
    took: dict[str, list[float]] = {"disk_s": [], "host_s": [], "release_s": []}

    async def timed(name: str, work: Any) -> None:
        began = time.monotonic()
        await work
        took[name].append(time.monotonic() - began)

    for name in ("disk_s", "host_s"):
        if name == "host_s":
            await host.load(id, lambda done, total: None)
        for _ in range(rounds):
            if name == "disk_s":
                give_up(files)
            await timed(name, gpu.load(id, lambda done, total: None))
            await timed("release_s", gpu.release(id))
    await host.release(id)
    await gpu.close()
    await host.close()
    return {**took, "bytes": sum(file.stat().st_size for file in files)}


# --- NVML -----------------------------------------------------------------------------------


def devices(word: str) -> Answer:
    """One GPU, by its number or UUID: cut up, its first instance."""
    import pynvml

    pynvml.nvmlInit()
    try:
        uuid = word.removeprefix("cuda:")
        by_number = pynvml.nvmlDeviceGetHandleByIndex
        handle = by_number(int(uuid)) if uuid.isdecimal() else pynvml.nvmlDeviceGetHandleByUUID(uuid)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        answer = {"uuid": pynvml.nvmlDeviceGetUUID(handle), "name": pynvml.nvmlDeviceGetName(handle)}
        answer |= {"total_bytes": memory.total, "used_bytes": memory.used, "free_bytes": memory.free}
        return answer | {"driver": pynvml.nvmlSystemGetDriverVersion()}
    finally:
        pynvml.nvmlShutdown()


def gone(device: str, used_bytes: str) -> Answer:
    """Wait until no more than this is used; NVML is asked by processes that end."""
    began = time.monotonic()
    while time.monotonic() < began + TIMEOUT_S:
        used = devices(device)["used_bytes"]
        if used <= int(used_bytes):
            return {"used_bytes": used}
        time.sleep(POLL_S)
    raise TimeoutError(f"{used} bytes are used, not {used_bytes}")


WORDS: dict[str, Callable[..., Answer]] = {
    each.__name__: each
    for each in (prefetch, pin, unpin, evict, until, empty, room, exchange, loads, devices, gone)
}


def main() -> None:
    word, *arguments = sys.argv[1:]
    try:
        say(WORDS[word](*arguments))
    except Exception as error:
        words = error.details() if hasattr(error, "details") else f"{type(error).__name__}: {error}"  # gRPC's
        say({"error": f"{word}: {words}"})


if __name__ == "__main__":
    main()
