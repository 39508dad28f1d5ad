"""What problems of devices say, and the words in them.

Owns these texts; decides nothing. Pure.
"""

from __future__ import annotations

from cached.model import ArtifactId, Claim, Device, ErrorKind, Problem
from cached.plan.state import Place, State

STANDBY_WAIT_S = 15.0
"""How long a lease waits for a device whose standby is not connected."""
ROOM_RETRY_S = 30.0
OTHER_UID_RETRY_S = 5.0
OF_OWNERS = ("UNCLAIMED_GPU", "CLAIMED_GPU")
"""Reasons of a refusal that holds for one pin, and may not for another of the same content."""


def gb(size_bytes: int) -> str:
    """Bytes for people, in decimal units."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size_bytes >= size:
            return f"{size_bytes / size:.2f} {unit}"
    return f"{size_bytes} B"


def claim_words(claim: Claim) -> str:
    holder = f" of {claim.holder.words()}" if claim.holder else ""
    return f"a {claim.kind.value} on {claim.device}{holder}"


def no_standby_problem(device: Device) -> Problem:
    return Problem(
        ErrorKind.UNAVAILABLE,
        "NO_STANDBY",
        f"no standby for {device} has been connected for {STANDBY_WAIT_S:.0f} s",
        "start 'preloader serve' with the same run directory (or 'cached serve --with-preloader'), "
        "or acquire with on='disk'",
        STANDBY_WAIT_S,
    )


def name_of(state: State, artifact: ArtifactId) -> str:
    """What people call it: a ref where one is known."""
    proven = state.artifacts.get(artifact)
    return proven.refs[0] if proven is not None and proven.refs else artifact


def unfit_problem(device: Device, place: Place) -> Problem:
    return Problem(
        ErrorKind.UNAVAILABLE,
        "GPU_UNFIT",
        f"{device} is not fit for use: {place.unfit_reason}",
        "reset or replace the device ('nvidia-smi -q' and the kernel's log say more), with the preloader and "
        "the daemon stopped, which keep it open; "
        "replicas get it from the host meanwhile",
        ROOM_RETRY_S,
    )


def no_tensors_problem(name: str, device: Device) -> Problem:
    return Problem(
        ErrorKind.PRECONDITION,
        "NO_TENSORS",
        f"{name} has no safetensors files, and nothing else stands on {device}",
        "keep it on host, where whole files stand",
    )


def unclaimed_problem(device: Device) -> Problem:
    return Problem(
        ErrorKind.PRECONDITION,
        "UNCLAIMED_GPU",
        f"{device} is given to nobody by an orchestrator, and this pin is not for such GPUs",
        "pin it with --unclaimed (unclaimed = true in [[pin]]) where the GPU is cached's to fill, or on host",
    )


def given_problem(device: Device, tenant: str) -> Problem:
    return Problem(
        ErrorKind.PRECONDITION,
        "CLAIMED_GPU",
        f"{device} is given to {tenant}, who has its memory now",
        "replicas there get it from the host; it is loaded when the GPU is given to somebody else",
    )


def not_pinned_problem(device: Device) -> Problem:
    return Problem(
        ErrorKind.PRECONDITION,
        "NOT_PINNED",
        f"it does not stand on {device}, and only pins load onto GPUs",
        f"pin it there (cachectl pin REF --on {device}), or acquire it on host or disk and prefer the GPU",
    )


def other_uid_problem(claim: Claim, uid: int) -> Problem:
    """Without a word on who it is: replicas do not see each other."""
    return Problem(
        ErrorKind.UNAVAILABLE,
        "HELD_BY_OTHER_UID",
        f"{claim.ref} on {claim.device} is shared within one uid; this is uid {uid}, and another holds it",
        "run replicas that are to share a GPU's copy as one uid, or acquire it from host or disk; 'cachectl "
        "show' tells operators who holds it",
        OTHER_UID_RETRY_S,
    )
