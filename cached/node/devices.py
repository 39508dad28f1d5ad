"""What a person's words for a device mean on this node: a number is the GPU that has it now.

Pure: reads the planner's state, changes nothing.
"""

from __future__ import annotations

import re

from cached.model import ANY_GPU, EVERY_GPU, CachedError, Device, ErrorKind, Gpu, permanent
from cached.plan.state import State
from cached.standby import is_gpu

_NUMBER = re.compile(r"cuda:(\d{1,4})")


def meant(state: State, device: Device) -> Device:
    """``cuda:<number>`` by its UUID; anything else as it is. Raises CachedError (NO_SUCH_DEVICE; BAD_DEVICE
    where it is several instances of MIG)."""
    match = _NUMBER.fullmatch(device)
    if match is None:
        return device
    found = [known for known, gpu in gpus(state).items() if gpu.index == int(match[1])]
    if len(found) > 1:
        what = f"{device} is split into {len(found)} instances of MIG"
        raise permanent(ErrorKind.INVALID, "BAD_DEVICE", what, "name one: " + " or ".join(found))
    if not found:
        raise _no_such(state, device)
    return found[0]


def one_gpu(state: State, device: Device) -> Device:
    """A GPU that is here, or was until its standby went, by number or UUID. Raises CachedError
    (NO_SUCH_DEVICE)."""
    device = meant(state, device)
    if not is_gpu(device) or device not in state.places:
        raise _no_such(state, device)
    return device


def one_device(state: State, device: Device) -> Device:
    """One device, and not any of several. Raises CachedError (NO_SUCH_DEVICE, BAD_DEVICE)."""
    if device in (ANY_GPU, EVERY_GPU):
        raise permanent(
            ErrorKind.INVALID,
            "BAD_DEVICE",
            f"{device} is no single device; only pins go to several",
            "name one: disk, host or cuda:GPU-<uuid>",
        )
    return meant(state, device)


def gpus(state: State) -> dict[Device, Gpu]:
    """Those whose standby is connected, by number."""
    found = [(p.inventory.gpu, d) for d, p in state.places.items() if p.inventory and p.inventory.gpu]
    return {device: gpu for gpu, device in sorted(found, key=lambda known: known[0].index)}


def _no_such(state: State, device: Device) -> CachedError:
    here = ", ".join(f"{g.index} is {d} ({g.name})" for d, g in gpus(state).items() if is_gpu(d))
    return permanent(
        ErrorKind.NOT_FOUND,
        "NO_SUCH_DEVICE",
        f"{device} is not on this node",
        f"of those that are, {here}"
        if here
        else "no GPU's standby is connected: is 'preloader serve' running, and does 'nvidia-smi' see one?",
    )
