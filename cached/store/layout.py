"""Where everything lies below the data directory, and the records that are written there.

Owns names, paths and formats. Touches no file.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from cached.durable import complete_lines
from cached.model import (
    CHUNK_BYTES,
    Artifact,
    ArtifactId,
    Aside,
    Blob,
    Claim,
    ClaimId,
    Digest,
    Note,
    Ref,
    Revision,
    RevisionKey,
    is_digest,
)

VERSION = b"1\n"
PENDING = ".pending-"
NEW_TREE = ".new-"
HUB_SCRATCH = ".ref.tmp"
LARGEST_INDEX = 1_000_000
"""More chunks than a blob of 16 TB has; a journal line that names a later one is rubbish."""

T = TypeVar("T")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_FOLDER = re.compile(r"models--([A-Za-z0-9][\w.-]*)--([A-Za-z0-9][\w.-]*)", re.ASCII)
_CLAIM_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")
_CHUNK_LINE = re.compile(r"([0-9]{1,7}) ([0-9a-f]{32})")
_DONE_LINE = re.compile(r"done ([0-9a-f]{64})")


# --- what the room answers with -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Head:
    """What a manifest says of its origin."""

    id: ArtifactId
    ref: Ref
    revision: RevisionKey
    attested: bool


@dataclass(frozen=True, slots=True)
class Ingest:
    """What a transfer left: ``have_bytes`` counts partial blobs (with the space reserved for them)
    and those committed blobs that no artifact has; ``ran_at`` is when it last wrote something."""

    revision: Revision
    have_bytes: int
    ran_at: float


@dataclass(frozen=True, slots=True)
class IngestPlan:
    """Where a transfer's partial blobs go; ``have[i]`` is file ``i`` where it is committed already.
    ``asides``: what was found damaged on the way, and is quarantined."""

    directory: Path
    have: tuple[Blob | None, ...]
    asides: tuple[Aside, ...] = ()


@dataclass(frozen=True, slots=True)
class TakenDown:
    """An artifact that a scan found damaged. ``ref`` is empty where nothing on disk tells it any more."""

    artifact: ArtifactId
    ref: Ref
    reason: str


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """What a quarantine took down, the transfers that keep the contents which were not damaged, and the one
    that was (None where nothing was left of it)."""

    artifacts: tuple[ArtifactId, ...]
    leftovers: tuple[Revision, ...]
    aside: Aside | None


@dataclass(frozen=True, slots=True)
class Scan:
    """What a start found. ``heads`` and ``artifacts`` run in parallel; ``problems`` are for the operator;
    ``blobs`` are all contents that stay, with their bytes."""

    artifacts: tuple[Artifact, ...]
    heads: tuple[Head, ...]
    notes: tuple[Note, ...]
    claims: tuple[Claim, ...]
    ingests: tuple[Ingest, ...]
    quarantined: tuple[TakenDown, ...]
    problems: tuple[str, ...]
    blobs: tuple[tuple[Digest, int], ...] = ()
    asides: tuple[Aside, ...] = ()


@dataclass(frozen=True, slots=True)
class Room:
    """What the file system has, and what of it is ours: blobs, transfers with the space that they have
    taken by now, quarantine."""

    own_bytes: int
    total_bytes: int
    free_bytes: int


# --- records on disk ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Intent:
    """``reason.json`` of a quarantined blob; written first, so that a start can finish the job."""

    digest: Digest
    reason: str
    at: float
    artifacts: tuple[ArtifactId, ...]


@dataclass(frozen=True, slots=True)
class SetAside:
    """``reason.json`` of a record that could not be read."""

    name: str
    reason: str
    at: float


@dataclass(frozen=True, slots=True)
class ScrubMark:
    """How far the scrubber is. ``cursor`` is the last digest of this round that was read, empty between two
    rounds; Unix seconds, 0 for never."""

    cursor: str = ""
    began_at: float = 0.0
    finished_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Journal:
    """What a worker noted of one file. ``chunks`` is complete only for ``done``."""

    chunks: dict[int, str]
    done: Digest | None

    def blob(self, size_bytes: int) -> Blob | None:
        """The finished blob, if the journal has all of it."""
        count = -(-size_bytes // CHUNK_BYTES)
        if self.done is None or not all(i in self.chunks for i in range(count)):
            return None
        return Blob(self.done, size_bytes, tuple(self.chunks[i] for i in range(count)))


def parse_journal(data: bytes) -> Journal:
    """Later lines win; what is no line of a journal is passed over, for every line is proven when used."""
    chunks: dict[int, str] = {}
    done: Digest | None = None
    for line in complete_lines(data):
        if (chunk := _CHUNK_LINE.fullmatch(line)) and int(chunk[1]) <= LARGEST_INDEX:
            chunks[int(chunk[1])] = chunk[2]
        elif finished := _DONE_LINE.fullmatch(line):
            done = Digest(finished[1])
    return Journal(chunks, done)


def format_journal(blob: Blob) -> bytes:
    """The journal of a finished file."""
    lines = [f"{index} {chunk}" for index, chunk in enumerate(blob.chunks)]
    return "".join(f"{line}\n" for line in [*lines, f"done {blob.sha256}"]).encode()


def encode(record: object) -> bytes:
    return msgspec.json.encode(record) + b"\n"


def decode(data: bytes, kind: type[T]) -> T | None:
    """None for what is no such record."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.MsgspecError:
        return None


# --- paths ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths below one data directory."""

    root: Path

    @property
    def version(self) -> Path:
        return self.root / "VERSION"

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    @property
    def scrub(self) -> Path:
        return self.root / "scrub.json"

    @property
    def blobs(self) -> Path:
        return self.root / "blobs" / "sha256"

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    @property
    def refs(self) -> Path:
        return self.root / "refs"

    @property
    def claims(self) -> Path:
        return self.root / "claims"

    @property
    def trees(self) -> Path:
        return self.root / "trees"

    @property
    def ingest(self) -> Path:
        return self.root / "ingest"

    @property
    def quarantine(self) -> Path:
        return self.root / "quarantine"

    def blob(self, digest: Digest) -> Path:
        assert is_digest(digest), digest
        return self.blobs / digest[:2] / digest

    def manifest(self, artifact: ArtifactId) -> Path:
        return self.artifacts / f"{_hex(artifact)}.json"

    def origin(self, artifact: ArtifactId) -> Path:
        """The revision that the artifact was fetched as: what fetching it again starts from."""
        return self.artifacts / f"{_hex(artifact)}.revision"

    def tree(self, artifact: ArtifactId) -> Path:
        return self.trees / _hex(artifact)

    def new_tree(self, artifact: ArtifactId) -> Path:
        return self.trees / f"{NEW_TREE}{_hex(artifact)}"

    # The Hub's cache: the names are huggingface_hub's.

    @property
    def hub(self) -> Path:
        return self.root / "hub"

    def hub_folder(self, repo: str) -> Path:
        return self.hub / hub_folder_name(repo)

    def hub_refs(self, repo: str) -> Path:
        return self.hub_folder(repo) / "refs"

    def hub_scratch(self, repo: str) -> Path:
        """Where a ref's file is written first; not beside it, for a branch may have any name."""
        return self.hub_folder(repo) / HUB_SCRATCH

    def snapshots(self, repo: str) -> Path:
        return self.hub_folder(repo) / "snapshots"

    def snapshot(self, repo: str, commit: str) -> Path:
        assert is_commit(commit), commit
        return self.snapshots(repo) / commit

    def new_snapshot(self, repo: str, commit: str) -> Path:
        return self.snapshots(repo) / f"{NEW_TREE}{commit}"

    def note(self, ref: Ref) -> Path:
        return self.refs / f"{hashlib.sha256(ref.encode()).hexdigest()}.json"

    def claim(self, claim: ClaimId) -> Path:
        assert _CLAIM_NAME.fullmatch(claim), claim
        return self.claims / f"{claim}.json"

    def transfer(self, key: RevisionKey) -> Path:
        assert is_digest(key), key
        return self.ingest / key

    def revision(self, key: RevisionKey) -> Path:
        return self.transfer(key) / "revision.json"

    def part(self, key: RevisionKey, index: int) -> Path:
        return self.transfer(key) / f"{index}.part"

    def journal(self, key: RevisionKey, index: int) -> Path:
        return self.transfer(key) / f"{index}.journal"


def hub_folder_name(repo: str) -> str:
    return f"models--{repo.replace('/', '--')}"


def hub_repo(folder_name: str) -> str | None:
    """The ``org/name`` that a folder is of; None where it is of none, or could be of two."""
    found = _HUB_FOLDER.fullmatch(folder_name)
    return f"{found[1]}/{found[2]}" if found and folder_name.count("--") == 2 else None


def is_commit(text: str) -> bool:
    return _COMMIT.fullmatch(text) is not None


def _hex(artifact: ArtifactId) -> str:
    digest = artifact.removeprefix("sha256:")
    assert is_digest(digest), artifact
    return digest
