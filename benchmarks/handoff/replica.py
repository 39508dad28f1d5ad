"""A replica, in a process of its own: it loads one model in one way, and says how long each step took.

Owns the ways: ours and others', each as its documentation says. Imports are made before the clock starts.
Says ``ready``, waits for ``go``, says ``done`` and its seconds; asked ``sum`` it says what it has loaded.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PAGE_BYTES = 4096
TIMEOUT_S = 500.0


@dataclass(frozen=True, slots=True)
class Task:
    """``kind`` is one of KINDS; ``ref`` what ours is asked for, ``path`` the files that others are."""

    kind: str
    ref: str
    path: str
    touch: bool = True

    def encode(self) -> str:
        return json.dumps(asdict(self))


State = dict[str, Any]
Load = Callable[[], tuple[State, float]]
"""The state dict, and the seconds until it could be mapped: 0 where nothing comes before."""


def prepare_ours(task: Task) -> Load:
    import cached
    from cached.client import granting  # noqa: F401  gRPC is imported with it

    def load() -> tuple[State, float]:
        began = time.perf_counter()
        model = cached.acquire(task.ref, on=task.kind.removeprefix("ours-"), timeout_s=TIMEOUT_S)
        exchanged_s = time.perf_counter() - began
        return dict(model.tensors), exchanged_s

    return load


def prepare_safetensors(task: Task) -> Load:
    from safetensors.torch import load_file

    def load() -> tuple[State, float]:
        state: State = {}
        for path in shards(task):
            state.update(load_file(path))
        return state, 0.0

    return load


def prepare_runai(task: Task) -> Load:
    from runai_model_streamer import SafetensorsStreamer

    def load() -> tuple[State, float]:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files([str(path) for path in shards(task)])
            return dict(streamer.get_tensors()), 0.0

    return load


def prepare_fastsafetensors(task: Task) -> Load:
    from fastsafetensors import SafeTensorsFileLoader

    def load() -> tuple[State, float]:
        loader = SafeTensorsFileLoader(None, "cpu", nogds=True)
        loader.add_filenames({0: [str(path) for path in shards(task)]})
        held = loader.copy_files_to_device()
        return {name: held.get_tensor(name) for name in held.key_to_rank_lidx}, 0.0

    return load


def prepare_tensorizer(task: Task) -> Load:
    from tensorizer import TensorDeserializer

    def load() -> tuple[State, float]:
        return dict(TensorDeserializer(task.path, device="cpu").items()), 0.0

    return load


def prepare_serializer(task: Task) -> Load:
    """Not a contestant: writes what tensorizer reads."""
    from safetensors.torch import load_file
    from tensorizer import TensorSerializer

    def load() -> tuple[State, float]:
        state: State = {}
        for path in shards(task):
            state.update(load_file(path))
        serializer = TensorSerializer(task.ref)
        serializer.write_state_dict(state)
        serializer.close()
        return state, 0.0

    return load


def prepare_bare(task: Task) -> Load:
    """Not a contestant: what a process's first call costs, whatever it asks."""
    import grpc

    from cached.v1 import model_cache_pb2 as pb
    from cached.v1.model_cache_pb2_grpc import ModelCacheStub

    def load() -> tuple[State, float]:
        with grpc.insecure_channel(f"unix:{task.path}/replicas/cached.sock") as channel:
            ModelCacheStub(channel).Ready(pb.ReadyRequest(lease_id="nobody's"))
        return {}, 0.0

    return load


KINDS: dict[str, Callable[[Task], Load]] = {
    "ours-host": prepare_ours,
    "ours-disk": prepare_ours,
    "safetensors": prepare_safetensors,
    "runai": prepare_runai,
    "fastsafetensors": prepare_fastsafetensors,
    "tensorizer": prepare_tensorizer,
    "serializer": prepare_serializer,
    "bare": prepare_bare,
}


def shards(task: Task) -> list[Path]:
    return sorted(Path(task.path).glob("*.safetensors"))


def touch(state: State) -> int:
    """Read a byte of every page: what has been put off until the first use happens now."""
    return sum(int(raw[::PAGE_BYTES].sum()) for raw in raws(state.values()) if len(raw))


def checksum(state: State) -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for raw in raws([tensor]):
            digest.update(raw)
    return str(digest.hexdigest())


def raws(tensors: Iterable[Any]) -> Iterable[Any]:
    """Each tensor's bytes, as an array over the same memory."""
    import torch

    for tensor in tensors:
        yield tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()


def perform(task: Task, load: Load) -> tuple[State, dict[str, float]]:
    began = time.perf_counter()
    state, exchanged_s = load()
    complete_s = time.perf_counter() - began
    if task.touch:
        touch(state)
    touched_s = time.perf_counter() - began
    return state, {"exchange": exchanged_s, "complete": complete_s, "touched": touched_s}


def main() -> None:
    task = Task(**json.loads(sys.argv[1]))
    # What libraries print is not for whoever listens.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    began = time.perf_counter()
    import torch  # noqa: F401

    torch_s = time.perf_counter() - began
    load = KINDS[task.kind](task)
    took = {"torch": torch_s, "library": time.perf_counter() - began - torch_s}
    print("ready", json.dumps(took), file=out)
    sys.stdin.readline()
    state, took = perform(task, load)
    print("done", json.dumps(took), file=out)
    if sys.stdin.readline() == "sum\n":
        print("sum", checksum(state), file=out)
    # Whatever else is at an exit is nobody's figure, and gigabytes take their time to be given back.
    out.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
