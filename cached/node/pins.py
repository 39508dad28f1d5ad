"""Pins: what operators, and the configuration file, want kept; made, ended, and one put in another's place.

Owns which pins are whose. A pin of the file lives as long as it stands there, so it needs no record of its
own: a start makes it anew. Every other one is durable before it is promised. Decides nothing about content.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace

from cached.config import PinSettings
from cached.model import (
    ANY_GPU,
    DISK,
    HOST,
    CachedError,
    Claim,
    ClaimId,
    ClaimKind,
    Device,
    ErrorKind,
    Ref,
    parse_device,
    parse_ref,
    permanent,
)
from cached.node.core import Core
from cached.node.effects import Effects
from cached.plan import host_swap_problem, is_gpu, swap_problem
from cached.plan import types as t

MAX_COPIES = 64
OF_FILE = "config-"


class Pins:
    """The pins of one node. ``config_file`` is named to whoever wants to end one that stands in it."""

    def __init__(self, core: Core, effects: Effects, config_file: str) -> None:
        self._core = core
        self._effects = effects
        self._config_file = config_file

    async def make(self, pin: Claim) -> None:
        """Keep there until unpinned; one that is there is changed to this, and left where it is the same."""
        self._core.check_room()
        if not self._is_there(pin):
            await self._effects.promise(pin)
            if not self._is_there(pin):
                self._replace(pin, pin.id)

    def _is_there(self, pin: Claim) -> bool:
        known = self._core.state.claims.get(pin.id)
        return known is not None and _wish(known) == _wish(pin)

    def _replace(self, pin: Claim, *ended: ClaimId) -> None:
        """One turn: the planner sees nothing in between."""
        claims = self._core.state.claims
        self._core.post(*(t.ClaimEnded(claim) for claim in ended if claim in claims), t.ClaimMade(pin))
        self._core.turn(time.time())

    async def end(self, ref: Ref) -> int:
        """Ends the ref's pins; returns how many there were.

        Raises NOT_FOUND where there is none, DENIED where only the configuration file has it.
        """
        pins = self._pins(ref)
        own = [pin for pin in pins if not is_of_file(pin)]
        if not pins:
            raise permanent(
                ErrorKind.NOT_FOUND, "NOT_PINNED", f"{ref} is not pinned", "'cachectl ls' shows the pins"
            )
        if not own:
            raise self._of_file(ref)
        for pin in own:
            await self._effects.forget_claim(pin.id)
            self._core.end(pin.id)
        return len(own)

    async def swap(self, out: Ref, pin: Claim) -> None:
        """Make ``pin`` and end those of ``out`` on its device, as one plan; it inherits what they allowed.

        Repeating it is harmless: what is done by then is left as it is. Raises CachedError.
        """
        self._core.check_room()
        there = [old for old in self._pins(out) if old.device == pin.device]
        if any(map(is_of_file, there)):
            raise self._of_file(out)
        if pin.device == DISK or out == pin.ref:
            raise _no_swap(out, pin)
        if not there:
            return self._check_swapped(out, pin)
        pin = replace(
            pin,
            priority=max(old.priority for old in there),
            unclaimed=any(old.unclaimed for old in there),
        )
        self._check_swap(out, pin)
        # The new promise first: a death in between leaves both pins, and the command to be repeated.
        await self._effects.promise(pin)
        for old in there:
            await self._effects.forget_claim(old.id)
        self._replace(pin, pin.id, *(old.id for old in there))

    def _check_swapped(self, out: Ref, pin: Claim) -> None:
        """With nothing to take the place of it was done before. Raises CachedError (NOT_PINNED) elsewhere."""
        if pin.id not in self._core.state.claims:
            elsewhere = ", ".join(old.device for old in self._pins(out))
            raise permanent(
                ErrorKind.NOT_FOUND,
                "NOT_PINNED",
                f"{out} is not pinned on {pin.device}" + (f" but on {elsewhere}" if elsewhere else ""),
                f"'cachectl pin {pin.ref} --on {pin.device}' needs nobody's place; 'cachectl ls' shows pins",
            )

    def _check_swap(self, out: Ref, pin: Claim) -> None:
        """Refuse what could not stand there in its place, before anything is changed. Raises CachedError."""
        state = self._core.state
        gone, come = state.notes.get(out), state.notes.get(pin.ref)
        if come is None:
            return
        leaves = gone.artifact if gone is not None else None
        if is_gpu(pin.device):
            problem = swap_problem(state, pin.device, leaves, come.artifact, pin.priority)
        else:
            problem = host_swap_problem(state, leaves, come.artifact)
        if problem is not None:
            raise CachedError(problem)

    def _pins(self, ref: Ref) -> list[Claim]:
        """The ref's pins, as they were made: a pool's copies are the planner's own."""
        state = self._core.state
        pins = [claim for claim in state.claims.values() if claim.kind is ClaimKind.PIN]
        return [pin for pin in pins if pin.ref == ref and pin.id not in state.members]

    def _of_file(self, ref: Ref) -> CachedError:
        return permanent(
            ErrorKind.DENIED,
            "PINNED_BY_CONFIG",
            f"{ref} is pinned by a [[pin]] table of {self._config_file}",
            "take it out of that file and restart the daemon",
        )


def _no_swap(out: Ref, pin: Claim) -> CachedError:
    return permanent(
        ErrorKind.INVALID,
        "BAD_SWAP",
        f"{pin.ref} in the place of {out} on {pin.device} is no swap",
        "name two models, and host or a GPU; on disk both can be",
    )


def pin_of(
    ref: Ref,
    device: Device,
    copies: int = 1,
    priority: int = 0,
    unclaimed: bool = False,
    of_file: bool = False,
) -> Claim:
    """The pin of ``ref`` there; one and the same for whoever asks again. Raises CachedError (INVALID)."""
    check_pin(device, copies, unclaimed)
    name = hashlib.sha256(f"{ref}\0{device}".encode()).hexdigest()[:32]
    return Claim(
        ClaimId((OF_FILE if of_file else "pin-") + name),
        ClaimKind.PIN,
        ref,
        device,
        time.time(),
        copies=copies,
        priority=priority,
        unclaimed=unclaimed,
    )


def pins_of_file(settings: tuple[PinSettings, ...]) -> tuple[Claim, ...]:
    """What the configuration file wants kept."""
    return tuple(
        pin_of(parse_ref(p.ref), parse_device(p.on), p.copies, p.priority, p.unclaimed, of_file=True)
        for p in settings
    )


def is_of_file(pin: Claim) -> bool:
    return pin.id.startswith(OF_FILE)


def check_pin(device: Device, copies: int, unclaimed: bool) -> None:
    """Refuse what no pin can mean. Raises CachedError (INVALID)."""
    why = ""
    if not 1 <= copies <= MAX_COPIES:
        why = f"{copies} copies are not 1 to {MAX_COPIES}"
    elif copies > 1 and device != ANY_GPU:
        why = f"copies go with {ANY_GPU} only, not with {device}"
    elif unclaimed and device in (DISK, HOST):
        why = f"'unclaimed' is about GPUs, not about {device}"
    if why:
        raise permanent(ErrorKind.INVALID, "BAD_PIN", f"this is no pin: {why}", "leave one of them out")


def _wish(pin: Claim) -> tuple[Ref, Device, int, int, bool]:
    return pin.ref, pin.device, pin.copies, pin.priority, pin.unclaimed
