"""The replica's end of handoff.sock: a one-time token for a lease and, maybe, memory.

Owns the descriptors it has received until it hands them on, and the reading of the index. Knows neither
gRPC nor torch.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cached import fds
from cached.client.errors import UNREACHABLE, CachedError

MAX_INDEX_BYTES = 256 * 1024 * 1024
SPARE_DESCRIPTORS = 16
"""What a replica may open elsewhere while it receives."""

_CODES = {
    "failed": "INTERNAL",
    "unavailable": "UNAVAILABLE",
    "invalid": "INVALID_ARGUMENT",
    "not_found": "NOT_FOUND",
    "data_loss": "DATA_LOSS",
    "no_room": "RESOURCE_EXHAUSTED",
    "denied": "PERMISSION_DENIED",
    "deadline": "DEADLINE_EXCEEDED",
    "precondition": "FAILED_PRECONDITION",
}


@dataclass(frozen=True, slots=True)
class File:
    """One file of a model: its name inside ``Model.path``, its size, and the sha256 it was proven by."""

    path: str
    size_bytes: int
    sha256: str


class Place(NamedTuple):
    """Where one tensor lies: ``offset_bytes`` counts from the start of ``files[file]``.

    ``dtype`` is the safetensors name, ``shape`` in elements. A tuple, for there are tens of thousands, and
    these are made several times as fast as frozen dataclasses.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Index:
    """What was handed off: the identity, the files, and every tensor of them."""

    id: str
    ref: str
    revision: str
    attested: bool
    files: tuple[File, ...]
    places: tuple[Place, ...]

    def blobs(self) -> dict[str, int]:
        """sha256 -> size in bytes of each distinct content, in the order of the handoff's descriptors."""
        return {f.sha256: f.size_bytes for f in self.files}


@dataclass(frozen=True, slots=True)
class Handoff:
    """What a token was worth. The receiver owns ``lease_fd`` and ``memory_fds``.

    ``memory_fds`` are on the host one for each of ``index.blobs()``, on a GPU the layout and then its blocks,
    from the disk none.
    """

    index: Index
    lease_fd: int
    memory_fds: tuple[int, ...]

    def blob_fds(self) -> dict[str, int]:
        """sha256 -> descriptor, for memory on the host. Raises CachedError where they do not match."""
        names = self.index.blobs()
        if len(self.memory_fds) != len(names):
            raise foreign(f"{len(self.memory_fds)} descriptors came for {len(names)} blobs")
        return dict(zip(names, self.memory_fds, strict=True))

    def close(self) -> None:
        """Close every descriptor, where nobody takes them over."""
        for fd in (self.lease_fd, *self.memory_fds):
            os.close(fd)


def redeem(path: Path, token: str, timeout_s: float) -> Handoff:
    """Exchange ``token`` on the socket at ``path``.

    Raises CachedError: what the daemon refused, or UNREACHABLE where it went away in between.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            connection.connect(str(path))
            fds.send(connection, {"token": token})
            header, received = fds.receive(connection)
    except TimeoutError as error:
        hint = "allow more time (timeout_s)"
        raise CachedError(
            "DEADLINE_EXCEEDED", "HANDOFF_TIMEOUT", f"no handoff came from {path}", hint
        ) from error
    except (OSError, fds.FramingError) as error:
        message = f"the handoff at {path} broke off: {error}"
        hint = "the daemon is restarting, or its replicas/ directory is not all mounted"
        raise CachedError("UNAVAILABLE", UNREACHABLE, message, hint, 1.0) from error
    try:
        return _unpack(header, received)
    except BaseException:
        for fd in received:
            os.close(fd)
        raise


def check_room(blobs: int) -> None:
    """Refuse a handoff of more descriptors than this process may have open, before it is spent.

    The kernel would cut the message off midway. Raises CachedError (RESOURCE_EXHAUSTED).
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/proc/self/fd")) + 2 + blobs + SPARE_DESCRIPTORS
    if limit != resource.RLIM_INFINITY and needed > limit:
        message = f"the model comes in {blobs} descriptors: {needed} would be open, and the limit is {limit}"
        hint = f"raise the limit of open files to at least {needed} (ulimit -n), or acquire on='disk'"
        raise CachedError("RESOURCE_EXHAUSTED", "TOO_FEW_DESCRIPTORS", message, hint)


def _unpack(header: dict[str, Any], received: list[int]) -> Handoff:
    refusal = header.get("error")
    if isinstance(refusal, dict):
        raise _refused(refusal)
    if len(received) < 2:
        raise foreign(f"{len(received)} descriptors came")
    lease, index_fd, *memory_fds = received
    index = _parse(read_all(index_fd))
    os.close(index_fd)
    return Handoff(index, lease, tuple(memory_fds))


@contextlib.contextmanager
def without_gc() -> Iterator[None]:
    """Tens of thousands of small objects made here would have the collector walk all that torch has, for
    longer than making them takes. None of them is part of a cycle."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _refused(error: dict[str, Any]) -> CachedError:
    code = _CODES.get(str(error.get("kind")), "UNKNOWN")
    retry = error.get("retry_after_s")
    reason, message, hint = (str(error.get(name, "")) for name in ("reason", "message", "hint"))
    wait_s = float(retry) if isinstance(retry, int | float) else None
    return CachedError(code, reason, message, hint, wait_s)


def read_all(fd: int) -> bytes:
    """What lies behind a received descriptor: an index or a layout. Raises CachedError."""
    size = os.fstat(fd).st_size
    if size > MAX_INDEX_BYTES:
        raise foreign(f"its index has {size} bytes; at most {MAX_INDEX_BYTES} are taken")
    content = os.pread(fd, size, 0)
    if len(content) != size:
        raise foreign(f"{len(content)} of {size} bytes of its index could be read")
    return content


def _parse(content: bytes) -> Index:
    try:
        with without_gc():
            body = json.loads(content)
            files = tuple(
                File(f["path"], f["blob"]["size_bytes"], f["blob"]["sha256"]) for f in body["files"]
            )
            places = tuple(_place(t, len(files)) for t in body["tensors"])
            return Index(body["id"], body["ref"], body["revision"], body["attested"], files, places)
    except (ValueError, KeyError, TypeError) as error:
        raise foreign(f"its index is not understood: {error!r}") from error


def _place(t: dict[str, Any], files: int) -> Place:
    file = t["file"]
    if not 0 <= file < files:
        raise ValueError(f"tensor {t['name']} lies in file {file} of {files}")
    return Place(t["name"], t["dtype"], tuple(t["shape"]), file, t["offset_bytes"], t["size_bytes"])


def foreign(what: str) -> CachedError:
    """An error for what only a daemon of another version would send."""
    hint = "the daemon and the replica's cached package are of different versions; bring them together"
    return CachedError("INTERNAL", "FOREIGN_HANDOFF", f"the handoff is not as agreed: {what}", hint)
