"""Leases are descriptors: open files of ``$RUN/leases/<claim id>`` with a shared flock.

Owns that directory. A lease lives as long as any process has its descriptor open, whoever of us
restarts, and ends with the last one. This room makes them, finds again what a predecessor gave
out, and tells which have ended; it does not know what they protect.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from cached.durable import Fs
from cached.model import CachedError, Claim, ClaimId, temporary

MAX_RECORD_BYTES = 64 * 1024


class Leases:
    """The leases of one node. Not durable beyond the machine's life, and not meant to be: $RUN is a tmpfs."""

    def __init__(self, directory: Path, fs: Fs) -> None:
        self._directory = directory
        self._fs = fs
        # One more open file for each lease, to try its lock without a look-up.
        self._probes: dict[ClaimId, int] = {}

    def restore(self, on_problem: Callable[[str], None]) -> tuple[Claim, ...]:
        """What replicas still hold from before; what nobody holds is removed."""
        self._fs.make_dir(self._directory, 0o700)
        found: list[Claim] = []
        for name in self._fs.list_dir(self._directory):
            claim = self._restore(self._directory / name, on_problem)
            if claim is not None:
                found.append(claim)
        return tuple(found)

    def _restore(self, path: Path, on_problem: Callable[[str], None]) -> Claim | None:
        probe = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        if _is_free(probe):
            os.close(probe)
            self._fs.unlink(path, missing_ok=True)
            return None
        try:
            claim = msgspec.json.decode(os.pread(probe, MAX_RECORD_BYTES, 0), type=Claim)
        except msgspec.MsgspecError as error:
            # Held, but by whom and on what cannot be read: it must not be taken for free, nor for known.
            os.close(probe)
            on_problem(f"{path} is held but unreadable: {error}")
            return None
        self._probes[claim.id] = probe
        return claim

    def create(self, claim: Claim) -> int:
        """A new lease's descriptor, locked; the caller hands it out and closes its own copy.

        Raises CachedError where the run directory is full or the limit of open files is reached.
        """
        path = self._directory / claim.id
        self._fs.write_file(path, msgspec.json.encode(claim), 0o600)
        try:
            lease = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(lease, fcntl.LOCK_SH)
                self._probes[claim.id] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                os.close(lease)
                raise
        except OSError as error:
            self._fs.unlink(path, missing_ok=True)
            raise _cannot_lease(path, error) from error
        return lease

    def ended(self) -> list[ClaimId]:
        """The leases that nobody holds any more; they are forgotten by this."""
        gone = [claim for claim, probe in self._probes.items() if _is_free(probe)]
        for claim in gone:
            os.close(self._probes.pop(claim))
            self._fs.unlink(self._directory / claim, missing_ok=True)
        return gone

    def close(self) -> None:
        """Let go of the probes; the leases live on with their holders."""
        for probe in self._probes.values():
            os.close(probe)
        self._probes.clear()


def _is_free(probe: int) -> bool:
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(probe, fcntl.LOCK_UN)
        return True
    return False


def _cannot_lease(path: Path, error: OSError) -> CachedError:
    return temporary(
        "LEASE_NOT_MADE",
        f"the lease {path} could not be made: {error.strerror}",
        "look at the run directory's free space and at the daemon's limit of open files",
        5.0,
    )
