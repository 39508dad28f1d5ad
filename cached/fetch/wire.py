"""What the pool and its workers say to each other: one JSON line each, over the worker's stdin and stdout.

Owns the words and their encoding; no I/O. A worker has one request at a time, answers it with any
number of ``Advanced``, ``Wanted`` and ``Sealed``, and closes it with exactly one of the others. Orders may
come while a fetch runs; when none does, they mean nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from cached.config import SourceSettings, TransferSettings
from cached.model import Blob, Digest, Manifest, Problem, Ref, Revision

MAX_LINE_BYTES = 256 * 1024 * 1024
"""The longest line: a manifest of MAX_MANIFEST_TENSORS tensors."""
MAX_MANIFEST_TENSORS = 1_000_000


@dataclass(frozen=True, slots=True)
class FetchJob:
    """Bring a revision's files into ``ingest_dir``, which is ``ingest/<revision key>`` of a store.

    ``have[i]`` is the blob of file ``i`` where the store has it already, else None. A ``background`` job
    begins as one that nobody waits for.
    """

    revision: Revision
    ingest_dir: str
    have: tuple[Blob | None, ...]
    background: bool
    read_soon: bool = False


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A blob that is not what its name says, and in which way."""

    digest: Digest
    reason: str


# --- orders ---------------------------------------------------------------------------------


class Pace(msgspec.Struct, frozen=True, tag=True):
    """How a fetch may go on from now: its rate (None: no limit) and connections over all its files.

    Without connections it is held: it leaves its ranges, and reads what it could not go on with later (files
    of an origin without ranges) at this rate. A ``background`` one runs at low priority and leaves no page
    cache behind.
    """

    rate_bytes_per_s: int | None
    connections: int
    background: bool


class Yours(msgspec.Struct, frozen=True, tag=True):
    """The content is this worker's to fetch."""

    digest: Digest


class Taken(msgspec.Struct, frozen=True, tag=True):
    """Another worker fetches the content: ``Have`` or ``Yours`` follows."""

    digest: Digest


class Have(msgspec.Struct, frozen=True, tag=True):
    """The store has this blob by now."""

    blob: Blob


Order = Pace | Yours | Taken | Have


# --- requests -------------------------------------------------------------------------------


class Resolve(msgspec.Struct, frozen=True, tag=True):
    ref: Ref
    settings: TransferSettings
    source: SourceSettings


class Fetch(msgspec.Struct, frozen=True, tag=True):
    job: FetchJob
    settings: TransferSettings
    source: SourceSettings
    pace: Pace


class Verify(msgspec.Struct, frozen=True, tag=True):
    """``files``: path, expected sha256, expected size in bytes. Read no faster than the rate, if any."""

    files: tuple[tuple[str, Digest, int], ...]
    rate_bytes_per_s: int | None = None


Request = Resolve | Fetch | Verify


# --- replies --------------------------------------------------------------------------------


class Advanced(msgspec.Struct, frozen=True, tag=True):
    """How far a request is: bytes in place (or proven), and bytes received from the origin for it."""

    done_bytes: int
    origin_bytes: int = 0


class Wanted(msgspec.Struct, frozen=True, tag=True):
    """May this content be fetched here? Answered by ``Yours``, ``Taken`` or ``Have``."""

    digest: Digest


class Sealed(msgspec.Struct, frozen=True, tag=True):
    """The partial blob of file ``index`` is complete, proven, durable and read-only."""

    index: int
    blob: Blob


class Resolved(msgspec.Struct, frozen=True, tag=True):
    revision: Revision


class Fetched(msgspec.Struct, frozen=True, tag=True):
    manifest: Manifest


class Verified(msgspec.Struct, frozen=True, tag=True):
    mismatches: tuple[Mismatch, ...]


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The request's error. ``fsync`` when a failed fsync was it, of which the daemon must hear."""

    problem: Problem
    fsync: bool = False


Reply = Advanced | Wanted | Sealed | Resolved | Fetched | Verified | Failed


_encoder = msgspec.json.Encoder()
_requests: msgspec.json.Decoder[Request | Order] = msgspec.json.Decoder(Request | Order)
_replies: msgspec.json.Decoder[Reply] = msgspec.json.Decoder(Reply)


def encode(message: Request | Order | Reply) -> bytes:
    """The message as one line, its newline included."""
    return _encoder.encode(message) + b"\n"


def decode_request(line: bytes) -> Request | Order:
    return _requests.decode(line)


def decode_reply(line: bytes) -> Reply:
    """Raises msgspec.DecodeError."""
    return _replies.decode(line)
