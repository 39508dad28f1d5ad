"""What the services ask of whatever holds one device's memory: a loader (host) or a keeper (a GPU).

Owns the protocol between the two, so that there is one service for every kind of device, and what both kinds
do alike with descriptors.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from cached.model import (
    ArtifactId,
    CachedError,
    ErrorKind,
    Inventory,
    Resident,
    permanent,
    temporary,
)

NOBODY = -1
"""In the place of a uid: whoever keeps descriptors and gives them to no replica."""
ANYBODY = -2
"""In the place of the uid that was given something: there may have been any, so no other is the same."""

OnProgress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


class LoadCancelled(Exception):
    """Whoever asked for the load no longer wants it; nothing of it stays."""


class Standing(Protocol):
    """One device's residents. Every method may be called from any thread and raises CachedError."""

    def inventory(self) -> Inventory: ...

    def wait_for_change(self, seen: int, timeout_s: float) -> int:
        """The version of the inventory, once it differs from ``seen`` or the time is up."""

    def load(self, artifact: ArtifactId, on_progress: OnProgress, cancel: threading.Event) -> Resident:
        """Make an artifact resident; harmless where it is. Raises LoadCancelled once ``cancel`` is set."""

    def release(self, artifact: ArtifactId) -> bool:
        """Give back what no other resident shares. False where it was not resident."""

    def descriptors(self, artifact: ArtifactId, uid: int) -> tuple[int, tuple[int, ...]]:
        """The uid that was given them last, and duplicates for ``uid``, proven as far as that is needed; the
        caller closes them."""

    def node(self) -> int | None:
        """A descriptor of the device's node, where it has one that must stay open; the caller closes it."""

    def adopt(self, artifact: ArtifactId, uid: int, descriptors: list[int]) -> None:
        """Take a resident that was kept while this process was not there; owns the descriptors."""


def not_resident(artifact: ArtifactId) -> CachedError:
    return permanent(ErrorKind.NOT_FOUND, "NOT_RESIDENT", f"{artifact} is not resident", "load it first")


def duplicates(descriptors: Sequence[int]) -> tuple[int, ...]:
    """Raises CachedError (TOO_MANY_FILES), and then there are none."""
    copies: list[int] = []
    try:
        for fd in descriptors:
            copies.append(os.dup(fd))
    except OSError as error:
        close_all(copies)
        why = f"{len(descriptors)} descriptors cannot be duplicated: {error.strerror}"
        raise too_many_files(why) from error
    return tuple(copies)


def too_many_files(why: str) -> CachedError:
    hint = "raise the preloader's limit on open files (RLIMIT_NOFILE)"
    return temporary("TOO_MANY_FILES", why, hint, retry_after_s=5.0)


def close_all(descriptors: Iterable[int]) -> None:
    for fd in descriptors:
        os.close(fd)
