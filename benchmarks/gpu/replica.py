"""A replica with the GPU to itself as ``cuda:0``: it loads one model in one way, and keeps it.

``python -m benchmarks.gpu.replica WAY REF FOLDER``. Imports and its context are made before it is ``ready``;
then it answers ``load`` and ``sum``, one JSON line each, until its input ends. What ``disk`` loads is on no
GPU: sums are held against it.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

State = Mapping[str, Any]
TIMEOUT_S = 300.0
WAYS = ("gpu", "disk", "safetensors")


def where() -> str:
    """Torch's word for the device."""
    from cached.cuda import Driver

    kind = Driver().torch_device
    return "cuda:0" if kind == "cuda" else kind


def finish(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()


def load_ours(ref: str, on: str) -> tuple[Any, State, dict[str, Any]]:
    """The model, which holds the lease; its state; and the seconds of each part."""
    import cached
    from cached.client import handoff

    exchanged: list[float] = []
    redeem = handoff.redeem

    def noted(*arguments: Any) -> Any:
        taken = redeem(*arguments)
        exchanged.append(time.perf_counter())
        return taken

    handoff.redeem = noted
    began = time.perf_counter()
    model = cached.acquire(ref, on=on, timeout_s=TIMEOUT_S)
    mapped = time.perf_counter()
    state = model.state_dict()
    complete = time.perf_counter()
    handoff.redeem = redeem
    took = {
        "exchange_s": exchanged[-1] - began,
        "mapping_s": mapped - exchanged[-1],
        "tensors_s": complete - mapped,
        "complete_s": complete - began,
        "from": model.device,
        "streamed": model.streamed,
    }
    return model, state, took


def load_safetensors(folder: Path, device: str) -> tuple[Any, State, dict[str, Any]]:
    from safetensors.torch import load_file

    began, state = time.perf_counter(), {}
    for path in sorted(folder.glob("*.safetensors")):
        state.update(load_file(path, device=device))
    finish(device)
    return None, state, {"complete_s": time.perf_counter() - began}


def read(state: State, device: str) -> float:
    """Seconds in which kernels read every byte."""
    import torch

    began = time.perf_counter()
    total = torch.zeros((), dtype=torch.int64, device=device)
    for tensor in state.values():
        total += tensor.view(-1).view(torch.int16).sum(dtype=torch.int64)
    finish(device)
    return time.perf_counter() - began


def digest(state: State) -> str:
    """Of every byte as it is copied back."""
    import torch
    import xxhash

    found = xxhash.xxh3_128()
    for name in sorted(state):
        raw = state[name].view(-1).view(torch.uint8).cpu()
        found.update(f"{name} {state[name].dtype} {tuple(state[name].shape)}\n".encode())
        found.update((ctypes.c_ubyte * len(raw)).from_address(raw.data_ptr()))
    return str(found.hexdigest())


def prepare(way: str, ref: str, folder: Path) -> tuple[str, Callable[[], tuple[Any, State, dict[str, Any]]]]:
    """The device, with a context, and what loads."""
    import torch

    if way == "safetensors":
        import safetensors.torch  # noqa: F401
    else:
        from cached.client import granting  # noqa: F401  gRPC is imported with it
    device = "cpu" if way == "disk" else where()
    torch.ones(1, device=device).sum().item()
    if way == "safetensors":
        return device, lambda: load_safetensors(folder, device)
    return device, lambda: load_ours(ref, "disk" if way == "disk" else "cuda:0")


def main() -> None:
    way, ref, folder = sys.argv[1:]
    # What libraries print is not for whoever listens.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    began = time.perf_counter()
    device, load = prepare(way, ref, Path(folder))
    print("ready", json.dumps({"prepared_s": time.perf_counter() - began}), file=out)
    state: State = {}
    held = None
    for line in sys.stdin:
        if line == "load\n":
            held, state, took = load()
            took |= {"kernel_s": read(state, device), "tensors": len(state)}
            print("load", json.dumps(took), file=out)
        elif line == "sum\n":
            print("sum", json.dumps(digest(state)), file=out)
    del held


if __name__ == "__main__":
    main()
