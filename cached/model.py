"""The words of the house as types: refs, revisions, blobs, manifests, claims, holders, errors.

Owns the meaning of every record that crosses from one room to another, and the formulas of
identity. Imports nothing but the standard library; does no I/O, keeps no state, reads no clock.
"""

from __future__ import annotations

import enum
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NewType

Ref = NewType("Ref", str)
"""What a person writes: ``https://host/dir/``, ``hf://org/name@main``, ``oci://host/repo:tag``, …"""
RevisionKey = NewType("RevisionKey", str)
"""64 lower-case hex digits; what a ref resolved to, immutable."""
ArtifactId = NewType("ArtifactId", str)
"""``sha256:`` and 64 lower-case hex digits."""
Digest = NewType("Digest", str)
"""64 lower-case hex digits of a sha256."""
ClaimId = NewType("ClaimId", str)
Device = NewType("Device", str)
"""``disk``, ``host`` or ``cuda:<uuid>``."""

DISK = Device("disk")
HOST = Device("host")
ANY_GPU = Device("cuda:any")
EVERY_GPU = Device("cuda:all")
"""Pools, which only pins name: ``copies`` of the node's GPUs, or each of them."""

CHUNK_BYTES = 16 * 1024 * 1024
"""A blob is proven in memory by the xxh3_128 of each piece of this size."""
MAX_FILES = 10_000
MAX_REF_CHARS = 2048
MAX_PATH_CHARS = 512
MAX_REPO_CHARS = 255
"""Of a registry's name and a repository's together."""
MAX_TTL_S = 7 * 24 * 3600
ORIGIN_CHANGED = "ORIGIN_CHANGED"
"""The reason of a transfer that met other content than was listed: only another revision can be had."""


# --- errors ---------------------------------------------------------------------------------


class ErrorKind(enum.Enum):
    """What went wrong, as far as a caller can act on it; each is one gRPC status and exit code."""

    FAILED = "failed"
    UNAVAILABLE = "unavailable"
    INVALID = "invalid"
    NOT_FOUND = "not_found"
    DATA_LOSS = "data_loss"
    NO_ROOM = "no_room"
    DENIED = "denied"
    DEADLINE = "deadline"
    PRECONDITION = "precondition"


@dataclass(frozen=True, slots=True)
class Problem:
    """One error as a value: what, where, and how to mend it.

    ``reason`` is a stable SCREAMING_SNAKE word for programs; ``message`` says what and where;
    ``hint`` says how to mend it. ``retry_after_s`` is None for a permanent error, else the
    seconds after which trying again can help.
    """

    kind: ErrorKind
    reason: str
    message: str
    hint: str
    retry_after_s: float | None = None

    @property
    def temporary(self) -> bool:
        return self.retry_after_s is not None


class CachedError(Exception):
    """A problem on its way to whoever can act on it."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def permanent(kind: ErrorKind, reason: str, message: str, hint: str) -> CachedError:
    """An error that trying again cannot mend."""
    return CachedError(Problem(kind, reason, printable(message), hint))


def temporary(
    reason: str,
    message: str,
    hint: str,
    retry_after_s: float,
    kind: ErrorKind = ErrorKind.UNAVAILABLE,
) -> CachedError:
    """An error that may be gone after ``retry_after_s`` seconds."""
    return CachedError(Problem(kind, reason, printable(message), hint, retry_after_s))


def printable(text: str) -> str:
    """What others wrote, fit for one line of a terminal or a log: other signs become their escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# --- content --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FileSpec:
    """One file as its origin lists it. ``version`` is whatever else tells contents apart (ETag, mtime).

    ``checksum`` is what else the origin says of the content, checked while it is hashed: ``git:`` and the 40
    hex digits of a git blob id; or ``crc32:``, ``crc32c:``, ``crc64nvme:`` and theirs, which attest nothing.
    """

    path: str
    size_bytes: int
    sha256: Digest | None
    version: str = ""
    checksum: str = ""

    @property
    def attested(self) -> bool:
        """Whether the origin vouches for the content by a digest that we check."""
        return self.sha256 is not None or self.checksum.startswith("git:")


@dataclass(frozen=True, slots=True)
class Revision:
    """What a ref resolved to: files in path order, and the key that names exactly these."""

    ref: Ref
    key: RevisionKey
    files: tuple[FileSpec, ...]

    @property
    def size_bytes(self) -> int:
        return sum(f.size_bytes for f in self.files)

    @property
    def attested(self) -> bool:
        """Whether the origin vouched for every file's content."""
        return all(f.attested for f in self.files)

    @property
    def commit(self) -> str:
        """The commit that a ref of the Hub was, which each of its files has as version; empty for others."""
        return self.files[0].version if hub_parts(self.ref) and self.files else ""

    def content_key(self, index: int) -> str:
        """What file ``index`` is counted under: its digest, or a name of its own until it has one."""
        spec = self.files[index]
        return spec.sha256 if spec.sha256 is not None else f"{self.key}/{index}"


@dataclass(frozen=True, slots=True)
class Blob:
    """One content: its sha256, its size, and the xxh3_128 (32 hex digits) of each CHUNK_BYTES."""

    sha256: Digest
    size_bytes: int
    chunks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ManifestFile:
    path: str
    blob: Blob


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where one tensor lies: ``offset_bytes`` counts from the start of ``files[file]``.

    ``dtype`` is the safetensors name (``F32``, ``BF16``, ``F8_E4M3``, …), ``shape`` in elements.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What fetching a revision made. ``artifacts/<hex>.json`` and a handoff's index are this, as JSON.

    ``commit`` is the revision's; older records do without.
    """

    id: ArtifactId
    ref: Ref
    revision: RevisionKey
    attested: bool
    files: tuple[ManifestFile, ...]
    tensors: tuple[Tensor, ...]
    commit: str = ""

    def distinct_blobs(self) -> tuple[Blob, ...]:
        """Each content once, in order of first appearance: the order of a handoff's descriptors."""
        return tuple({f.blob.sha256: f.blob for f in self.files}.values())


@dataclass(frozen=True, slots=True)
class Artifact:
    """What the planner knows of a manifest: the id, and each distinct content with its size."""

    id: ArtifactId
    blobs: tuple[tuple[Digest, int], ...]
    last_used_at: float = 0.0
    images: tuple[tuple[Digest, int], ...] = ()
    """Each distinct content that has tensors, with the bytes that these take on a GPU; see ``blocks``."""

    @property
    def size_bytes(self) -> int:
        return sum(size for _, size in self.blobs)


@dataclass(frozen=True, slots=True)
class Note:
    """A resolution that led to a proven artifact: lets a warm acquire do without its origin.

    ``commit`` is the revision's, ``rate_bytes_per_s`` what its fetch took from the origin (0 where nobody
    measured); older records do without.
    """

    ref: Ref
    revision: RevisionKey
    artifact: ArtifactId
    attested: bool
    resolved_at: float
    commit: str = ""
    rate_bytes_per_s: float = 0.0


def note_of(
    revision: Revision, artifact: ArtifactId, resolved_at: float, rate_bytes_per_s: float = 0.0
) -> Note:
    return Note(
        revision.ref,
        revision.key,
        artifact,
        revision.attested,
        resolved_at,
        revision.commit,
        rate_bytes_per_s,
    )


@dataclass(frozen=True, slots=True)
class Aside:
    """A content in quarantine: its record's name there, its bytes, and since when (Unix s)."""

    name: str
    size_bytes: int
    at: float


def artifact_id(files: Iterable[tuple[str, int, str]]) -> ArtifactId:
    """The id over (path, size in bytes, sha256) of every file, in any order."""
    lines = sorted(f"{path}\0{size}\0{sha256}\n" for path, size, sha256 in files)
    return ArtifactId("sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest())


def revision_key(ref: Ref, files: Iterable[FileSpec]) -> RevisionKey:
    """The key of exactly these files from this ref."""
    # Without a checksum the body is what it always was: keys on disk stay what they are.
    lines = ([f.path, str(f.size_bytes), f.sha256 or "", f.version, f.checksum] for f in files)
    body = [ref, *sorted(line if line[-1] else line[:-1] for line in lines)]
    return RevisionKey(hashlib.sha256(json.dumps(body).encode()).hexdigest())


_ARTIFACT_ID = re.compile(r"sha256:[0-9a-f]{64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def is_artifact_id(text: str) -> bool:
    return _ARTIFACT_ID.fullmatch(text) is not None


def is_digest(text: str) -> bool:
    return _DIGEST.fullmatch(text) is not None


_SCHEME = re.compile(r"[a-z][a-z0-9+.-]{0,31}")
_HUB = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w][\w./-]{0,254})?", re.ASCII)
# As the distribution specification has names, tags and digests.
_WORD = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REGISTRY = re.compile(
    r"(?P<name>(?:[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?|\[[0-9a-f:.]+\])(?::(?P<port>[0-9]{1,5}))?"
    rf"/{_WORD}(?:/{_WORD})*)(?P<tag>:[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}})?(?P<digest>@sha256:[0-9a-f]{{64}})?"
)
_FRAGMENT = re.compile(r"sha256=([0-9A-Fa-f]{64})")
HUB_BRANCH = "main"
"""What a ref of the Hub means that names no revision."""


def parse_ref(text: str) -> Ref:
    """A ref as a person wrote it, checked for form only, in the one way to write it.

    A folder's ref always ends in a slash; a single file's (``https://host/file#sha256=…``), one of the Hub
    (``hf://org/name@revision``) and one of a registry (``oci://registry/repo:tag@sha256:…``, with ``:latest``
    where it names neither) never do. Which schemes there are is the origins' to say. Raises CachedError
    (INVALID) naming what is wrong.
    """
    if not text or len(text) > MAX_REF_CHARS or not text.isprintable() or " " in text:
        raise _bad_ref(text, f"a ref has 1 to {MAX_REF_CHARS} printable characters and no spaces")
    scheme, separator, rest = text.partition("://")
    if not separator or not _SCHEME.fullmatch(scheme):
        raise _bad_ref(text, "it does not begin with a scheme")
    # (A registry's port is no password, and the @ of its digest stands behind a slash.)
    login = rest.partition("/")[0] if scheme == "oci" else rest
    if "@" in login and ":" in login.partition("@")[0].partition("/")[0]:
        # Refs are stored and shown.
        raise _bad_ref("", "it has a password in it", "leave it out, and name it in a [[source]] table")
    if scheme == "hf":
        return _hub_ref(text, rest.rstrip("/"))
    if scheme == "oci":
        return _registry_ref(text, rest.rstrip("/"))
    address, mark, fragment = text.partition("#")
    _check_folder(text, scheme, address.partition("://")[2])
    return Ref(address.rstrip("/") + "/") if not mark else _file_ref(text, address, fragment)


def hub_parts(ref: Ref) -> tuple[str, str] | None:
    """(``org/name``, branch or tag or commit) of a ref of the Hub; None for every other."""
    if not ref.startswith("hf://"):
        return None
    repo, _, revision = ref.removeprefix("hf://").partition("@")
    return repo, revision or HUB_BRANCH


def _hub_ref(text: str, rest: str) -> Ref:
    if not _HUB.fullmatch(rest):
        raise _bad_ref(text, "a model on the Hub is hf://org/name or hf://org/name@revision")
    if any(part in ("", ".", "..") for part in rest.partition("@")[2].split("/")[1:]):
        raise _bad_ref(text, "what stands behind the @ is no name of a branch, tag or commit")
    return Ref(f"hf://{rest}")


def _registry_ref(text: str, rest: str) -> Ref:
    found = _REGISTRY.fullmatch(rest)
    if found is None or len(found["name"]) > MAX_REPO_CHARS or int(found["port"] or 0) > 65535:
        raise _bad_ref(
            text,
            "a model in a registry is oci://registry/repo:tag or oci://registry/repo@sha256:…, in lower case",
        )
    return Ref(f"oci://{rest}" if found["tag"] or found["digest"] else f"oci://{rest}:latest")


def _check_folder(text: str, scheme: str, rest: str) -> None:
    # Schemes that are not ours may do without a host: memory:///dir.
    rooted = rest.startswith("/")
    if not rest.strip("/") or (scheme == "file") > rooted or (scheme in ("http", "https", "s3")) & rooted:
        raise _bad_ref(text, "it names no directory")
    if "?" in rest:
        raise _bad_ref(text, "a query is not part of a directory's address")
    if ".." in rest.split("/"):
        raise _bad_ref(text, "it climbs out of a directory with '..'")


def _file_ref(text: str, address: str, fragment: str) -> Ref:
    if not address.startswith(("http://", "https://")):
        raise _bad_ref(text, "a fragment is not part of a directory's address")
    found = _FRAGMENT.fullmatch(fragment)
    if found is None:
        raise _bad_ref(text, "a single file is named with its digest: #sha256= and 64 hex digits")
    if address.endswith("/") or address.count("/") < 3:
        raise _bad_ref(text, "#sha256= stands behind a file's address, and this is a directory's")
    return Ref(f"{address}#sha256={found[1].lower()}")


def _bad_ref(text: str, why: str, hint: str = "") -> CachedError:
    shown = text if len(text) <= 80 else text[:77] + "..."
    return permanent(
        ErrorKind.INVALID,
        "BAD_REF",
        f"{shown!r} is not a ref: {why}" if shown or not hint else f"the ref is refused: {why}",
        hint
        or "write file:///dir, https://host/dir/, https://host/file#sha256=…, hf://org/name@revision, "
        "oci://registry/repo:tag or s3://bucket/prefix/",
    )


def parse_device(text: str) -> Device:
    """``disk`` (also for the empty string), ``host``, ``cuda:GPU-<uuid>`` (``MIG-``), ``cuda:<number>``,
    ``cuda:any`` or ``cuda:all``. Raises CachedError (INVALID)."""
    if text in ("", "disk"):
        return DISK
    if text == "host" or re.fullmatch(r"cuda:(\d{1,4}|any|all|(GPU|MIG)-[A-Za-z0-9-]{1,60})", text):
        return Device(text)
    raise permanent(
        ErrorKind.INVALID,
        "BAD_DEVICE",
        f"{text!r} is not a device",
        "use disk, host, cuda:GPU-<uuid>, cuda:<number>, cuda:any or cuda:all",
    )


def check_relative_path(path: str) -> None:
    """Refuse a file name that is absolute, climbs or cannot be a name. Raises CachedError (INVALID)."""
    parts = path.split("/")
    if (
        not path
        or len(path) > MAX_PATH_CHARS
        or not path.isprintable()
        or any(p in ("", ".", "..") or len(p.encode()) > 255 for p in parts)
    ):
        raise permanent(
            ErrorKind.INVALID,
            "UNSAFE_PATH",
            f"the origin names a file {path[:120]!r}, which could leave its folder or cannot be written",
            "mend the origin's listing; file names are relative, without '.', '..' or empty parts",
        )


# --- claims ---------------------------------------------------------------------------------


class ClaimKind(enum.Enum):
    PREFETCH = "prefetch"
    LEASE = "lease"
    PIN = "pin"


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lease: the uid was seen (None where it could not be), the rest is declared."""

    uid: int | None = None
    pid: int = 0
    host: str = ""
    command: str = ""
    pod: str = ""

    def words(self) -> str:
        """One line for people: ``uid 1000 (declares pid 7 on web-1: python serve.py)``."""
        uid = "uid unknown" if self.uid is None else f"uid {self.uid}"
        place = f" on {self.host}" if self.host else ""
        pod = f" in pod {self.pod}" if self.pod else ""
        command = f": {self.command}" if self.command else ""
        return f"{uid} (declares pid {self.pid}{place}{pod}{command})"


@dataclass(frozen=True, slots=True)
class Room:
    """Memory that a lease's holder wants free on a device before it starts."""

    device: Device
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Claim:
    """Somebody's wish to have a ref's content on a device.

    ``revision`` is what it is bound to once known. ``expires_at`` (Unix s) is set for TTL leases
    only. ``fresh`` asks the origin even where a resolution is noted.

    A lease is granted from the first of ``prefers`` where its artifact stands at that moment, else from
    ``device``; from then on ``device`` says from which. ``room`` is made before it is granted.

    A pin's ``device`` may be a pool (ANY_GPU, EVERY_GPU); ``copies`` counts with ANY_GPU. Pins of a higher
    ``priority`` are met first. On a GPU that nobody has claimed, only pins that are ``unclaimed`` stand.
    """

    id: ClaimId
    kind: ClaimKind
    ref: Ref
    device: Device
    made_at: float
    fresh: bool = False
    holder: Holder | None = None
    expires_at: float | None = None
    revision: RevisionKey | None = None
    artifact: ArtifactId | None = None
    prefers: tuple[Device, ...] = ()
    room: Room | None = None
    copies: int = 1
    priority: int = 0
    unclaimed: bool = False


@dataclass(frozen=True, slots=True)
class Resident:
    """One artifact in a device's memory. ``locked`` is False where it had to stay unlocked."""

    artifact: ArtifactId
    size_bytes: int
    locked: bool


@dataclass(frozen=True, slots=True)
class Inventory:
    """What a standby says of itself and its device. ``limit_bytes`` is the most it could ever hold."""

    device: Device
    pid: int
    limit_bytes: int
    can_lock: bool
    cannot_lock_reason: str
    write_protected: bool
    residents: tuple[Resident, ...]
    gpu: Gpu | None = None


@dataclass(frozen=True, slots=True)
class Gpu:
    """What is known of a GPU or MIG instance. ``index`` is its number on the node, as nvidia-smi counts.

    ``free_bytes`` is what the device reports. ``outside_bytes`` is memory of residents that were given back
    and are still mapped by somebody. ``unfit_reason`` says why nothing may stand there; empty where it may.
    """

    index: int
    name: str
    total_bytes: int
    free_bytes: int
    outside_bytes: int = 0
    unfit_reason: str = ""


class Phase(enum.Enum):
    RESOLVING = "resolving"
    QUEUED = "queued"
    FETCHING = "fetching"
    LOADING = "loading"
    WAITING = "waiting"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far something is. ``rate_bytes_per_s`` is smoothed; ``message`` says why it waits."""

    phase: Phase
    done_bytes: int = 0
    total_bytes: int = 0
    rate_bytes_per_s: float = 0.0
    message: str = ""

    @property
    def eta_s(self) -> float | None:
        if self.rate_bytes_per_s <= 0 or self.total_bytes <= 0:
            return None
        return max(0, self.total_bytes - self.done_bytes) / self.rate_bytes_per_s
