"""Which place a caller means by ``on``, and what the daemon is asked for it.

Owns the words for devices and the matching of this process's GPUs with the node's, by UUID. Asks the driver
only where a GPU is meant; knows neither gRPC nor torch's tensors.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, replace

from cached.client.errors import CachedError
from cached.cuda import CudaError, Driver, Gpu

DISK = "disk"
HOST = "host"
AUTO = "auto"
MAX_ROOM_BYTES = 2**60
IMPORT_FAILED = "GPU_IMPORT_FAILED"
_NOT_ON_THE_GPU = (
    IMPORT_FAILED,
    *("HELD_BY_OTHER_UID", "GPU_BUSY", "GPU_NOT_READY", "GPU_UNFIT", "GPU_OUT_OF_MEMORY"),
    *("FILLER_DIED", "FILLER_STUCK", "TOO_MANY_FILES"),
)
_NOT_ON_THE_HOST = ("NO_STANDBY", "DEVICE_CAPACITY", "EXCEEDS_MEMORY", "NO_MEMORY", "CHARGED_ELSEWHERE")


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked of the daemon, in its words, and the GPU of this process that it is asked for.

    ``streams`` says that the tensors are wanted on ``gpu`` wherever their bytes come from.
    """

    device: str
    prefers: tuple[str, ...] = ()
    gpu: Gpu | None = None
    streams: bool = False
    room_device: str = ""
    room_bytes: int = 0

    def after(self, reason: str) -> Wish | None:
        """What to ask for instead once this was refused for ``reason``; None where there is nothing less."""
        elsewhere = tuple(name for name in self.prefers if not name.startswith("cuda:"))
        if reason in _NOT_ON_THE_GPU and elsewhere != self.prefers:
            return replace(self, prefers=elsewhere)
        if reason in _NOT_ON_THE_HOST and self.device == HOST and self.streams:
            return replace(self, device=DISK)
        return None


def current() -> int:
    """The number of the GPU that torch takes for its current one, which each thread has of its own."""
    torch = sys.modules.get("torch")
    return torch.cuda.current_device() if torch is not None and torch.cuda.is_initialized() else 0


def wish(on: str, room_bytes: int = 0, room_on: str = "", at: int | None = None) -> Wish:
    """What ``on`` means in this process; ``at`` is ``current`` of the thread that asks, where it is not this
    one. Raises CachedError, NO_GPU for one that it has not."""
    if not 0 <= room_bytes <= MAX_ROOM_BYTES:
        hint = "ask for as many bytes as are to be free, or for 0"
        raise CachedError("INVALID_ARGUMENT", "BAD_ROOM", f"room_bytes={room_bytes} is no room", hint)
    at = current() if at is None else at
    wanted = _wanted(on, at)
    if not room_bytes:
        return wanted
    if re.fullmatch(r"cuda:(GPU|MIG)-[0-9a-fA-F-]{36}", room_on):  # no driver has to be asked for it
        return replace(wanted, room_device=room_on, room_bytes=room_bytes)
    if room_on or wanted.gpu is None:
        return replace(wanted, room_device=_name(_find(room_on or "cuda:0", at)), room_bytes=room_bytes)
    return replace(wanted, room_device=_name(wanted.gpu), room_bytes=room_bytes)


def _wanted(on: str, at: int) -> Wish:
    if on == AUTO:
        try:
            gpu = _nth(Driver().gpus(), at)
        except CudaError:
            return Wish(DISK, (HOST,))
        return Wish(DISK, (*_names(gpu), HOST), gpu) if gpu is not None else Wish(DISK, (HOST,))
    if on == "cuda" or on.startswith("cuda:"):
        gpu = _find(on, at)
        return Wish(HOST, _names(gpu), gpu, streams=True)
    if on not in ("", DISK, HOST):
        hint = "write disk, host, auto, cuda, cuda:N as torch counts, or cuda:GPU-<uuid>"
        raise CachedError("INVALID_ARGUMENT", "BAD_DEVICE", f"{on[:100]!r} is no device", hint)
    return Wish(on or DISK)


def _find(on: str, at: int) -> Gpu:
    """This process's GPU of that name: ``cuda`` (``at``), ``cuda:N``, ``cuda:<uuid>``. Raises CachedError."""
    word = re.fullmatch(r"cuda(?::(?:(?P<n>\d{1,4})|(?:GPU-|MIG-)?(?P<uuid>[0-9a-fA-F-]{36})))?", on)
    if word is None:
        hint = "write cuda, cuda:N as torch counts, or cuda:GPU-<uuid> as nvidia-smi -L shows it"
        raise CachedError("INVALID_ARGUMENT", "BAD_DEVICE", f"{on[:100]!r} is no GPU's name", hint)
    try:
        gpus = Driver().gpus()
        if word["uuid"]:
            gpu = next((gpu for gpu in gpus if gpu.uuid == word["uuid"].lower()), None)
        else:
            gpu = _nth(gpus, at if word["n"] is None else int(word["n"]))
    except CudaError as error:
        hint = (
            "give the process a GPU, its driver and cuda-bindings (in a forked child there is none), "
            "or acquire on='auto' or on='host'"
        )
        message = f"{on}: CUDA cannot be used here: {error}"
        raise CachedError("FAILED_PRECONDITION", "NO_GPU", message, hint) from error
    if gpu is None:
        message = f"{on}: this process sees {len(gpus)} GPUs, and not that one"
        raise CachedError("FAILED_PRECONDITION", "NO_GPU", message, "see CUDA_VISIBLE_DEVICES, nvidia-smi -L")
    return gpu


def _nth(gpus: list[Gpu], n: int) -> Gpu | None:
    """Torch and the driver count alike."""
    return gpus[n] if n < len(gpus) else None


def _names(gpu: Gpu) -> tuple[str, ...]:
    """The daemon's names for it: a UUID does not tell whether it is a GPU's or an instance's of MIG."""
    return (f"cuda:GPU-{gpu.uuid}", f"cuda:MIG-{gpu.uuid}")


def _name(gpu: Gpu) -> str:
    """Its one name where only one can be said; an instance of MIG says so in the device's own name."""
    return _names(gpu)[" MIG " in gpu.name]
