"""The room's face: one object that owns the data directory for as long as it is open.

Owns the lock and the index of what is committed; every sequence of changes is ``shelf``'s. Not for two
threads at once. Times are Unix seconds and arrive as arguments.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cached.blocks import images
from cached.durable import Fs, remove_tree, replace_file
from cached.model import (
    Artifact,
    ArtifactId,
    Aside,
    Blob,
    CachedError,
    Claim,
    ClaimId,
    Digest,
    ErrorKind,
    Manifest,
    Note,
    Ref,
    Revision,
    RevisionKey,
    artifact_id,
    note_of,
    permanent,
    temporary,
)
from cached.store.hub import HubView, noted, origin_of
from cached.store.layout import (
    VERSION,
    IngestPlan,
    Intent,
    Layout,
    Room,
    Scan,
    ScrubMark,
    Withdrawn,
    decode,
    encode,
)
from cached.store.scan import scan
from cached.store.shelf import PRIVATE_MODE, Shelf, check_paths

# What may lie in a directory that is about to become a store: our lock, a fresh ext4's own directory.
EMPTY_ENOUGH = frozenset({"lock", "lost+found", ".VERSION.tmp"})
RETRY_FETCH_S = 1.0
MOST_SCRUBBED = 64
"""Contents in one piece of the scrubber's work, however small."""


@dataclass(frozen=True, slots=True)
class _Entry:
    attested: bool
    blobs: tuple[Digest, ...]


class Store:
    """What is on disk. Made by ``open``; ``scan`` comes before everything else."""

    def __init__(self, shelf: Shelf, lock: int) -> None:
        """For ``open`` only."""
        self._shelf, self._fs, self._at = shelf, shelf.fs, shelf.at
        self._lock: int | None = lock
        self._entries: dict[ArtifactId, _Entry] = {}
        self._owners: dict[Digest, set[ArtifactId]] = {}
        self._notes: dict[Ref, Note] = {}
        self._hub = HubView(shelf)
        self._sizes: dict[Digest, int] = {}
        self._blob_bytes = 0
        self._asides: dict[str, Aside] = {}

    # --- start and end ----------------------------------------------------------------------

    @classmethod
    def open(cls, data_dir: Path, fs: Fs) -> Self:
        """Lock the directory and make what is missing.

        Raises CachedError PRECONDITION: ``STORE_LOCKED`` when another process has it, ``STORE_VERSION``
        when it is no store or one of another version.
        """
        at = Layout(data_dir.absolute())
        fs.make_dir(at.root)
        _check_version(fs, at)  # before anything is written into what may be somebody else's
        lock = fs.lock(at.lock)
        try:
            _make_directories(fs, at)
        except BaseException:
            fs.unlock(lock)
            raise
        return cls(Shelf(fs, at), lock)

    def close(self) -> None:
        """Give up the lock. Calling it again does nothing."""
        if self._lock is not None:
            self._fs.unlock(self._lock)
            self._lock = None

    def scan(self, now: float) -> Scan:
        """What is on disk, after finishing whatever a crash interrupted."""
        found = scan(self._shelf, self._hub, now)
        self._entries, self._owners = {}, {}
        for artifact, head in zip(found.artifacts, found.heads, strict=True):
            self._index(artifact.id, head.attested, (digest for digest, _ in artifact.blobs))
        self._notes = {note.ref: note for note in found.notes}
        self._sizes, self._blob_bytes = {}, 0
        for digest, size_bytes in found.blobs:
            self._count(digest, size_bytes)
        self._asides = {aside.name: aside for aside in found.asides}
        self._shelf.trim_records(self._asides)
        return found

    def _count(self, digest: Digest, size_bytes: int | None) -> None:
        """A blob is there with this size, or (None) not any more."""
        before_bytes = self._sizes.pop(digest, 0)
        if size_bytes is not None:
            self._sizes[digest] = size_bytes
        self._blob_bytes += (size_bytes or 0) - before_bytes

    def _index(self, artifact: ArtifactId, attested: bool, blobs: Iterable[Digest]) -> None:
        entry = _Entry(attested, tuple(blobs))
        self._entries[artifact] = entry
        for digest in entry.blobs:
            self._owners.setdefault(digest, set()).add(artifact)

    def _forget(self, artifact: ArtifactId) -> None:
        entry = self._entries.pop(artifact, None)
        for digest in entry.blobs if entry else ():
            self._owners[digest].discard(artifact)
            if not self._owners[digest]:
                del self._owners[digest]
        for ref in [ref for ref, note in self._notes.items() if note.artifact == artifact]:
            self._fs.unlink(self._at.note(ref), missing_ok=True)
            del self._notes[ref]

    # --- transfers --------------------------------------------------------------------------

    def begin_fetch(self, revision: Revision, now: float) -> IngestPlan:
        """Make room for a transfer, or take up what is left of one.

        A file that is committed under a known digest is not fetched again. Where nobody remembers its
        chunk digests it is read once and proven; if it is not what it says, it is quarantined.
        Raises CachedError DATA_LOSS ``BLOB_DAMAGED`` when a content that an artifact relies on is not intact.
        """
        check_paths([spec.path for spec in revision.files])
        directory, record = self._at.transfer(revision.key), self._at.revision(revision.key)
        self._fs.make_dir(directory, PRIVATE_MODE)
        data = encode(revision)
        if self._fs.size_bytes(record) != len(data) or self._fs.read_file(record) != data:
            self._shelf.put(record, data)
        manifests: dict[ArtifactId, dict[Digest, Blob]] = {}
        before = set(self._asides)
        have = tuple(self._have(revision, index, manifests, now) for index in range(len(revision.files)))
        asides = tuple(aside for name, aside in self._asides.items() if name not in before)
        return IngestPlan(directory, have, asides)

    def _have(
        self, revision: Revision, index: int, manifests: dict[ArtifactId, dict[Digest, Blob]], now: float
    ) -> Blob | None:
        spec = revision.files[index]
        journal = self._shelf.journal(revision.key, index)
        digest = spec.sha256 or journal.done
        size_bytes = self._fs.size_bytes(self._at.blob(digest)) if digest else None
        if digest is None or size_bytes is None:
            return None
        blob = self._committed(digest, size_bytes, manifests)
        if blob is None:
            noted = journal.blob(size_bytes) if journal.done == digest else None
            blob = self._unowned(digest, noted, now)
        # An origin may list a wrong size for a right digest: then its file is fetched, and refused by name.
        return blob if blob is not None and blob.size_bytes == spec.size_bytes else None

    def _committed(
        self, digest: Digest, size_bytes: int, manifests: dict[ArtifactId, dict[Digest, Blob]]
    ) -> Blob | None:
        """The blob as an artifact's manifest knows it; None where no artifact has it."""
        owner = min(self._owners.get(digest, ()), default=None)
        if owner is None:
            return None
        if owner not in manifests:
            manifests[owner] = {blob.sha256: blob for blob in self.manifest(owner).distinct_blobs()}
        blob = manifests[owner][digest]
        if blob.size_bytes != size_bytes:
            raise _damaged(self._at.blob(digest), size_bytes, blob)
        return blob

    def _unowned(self, digest: Digest, noted: Blob | None, now: float) -> Blob | None:
        """The blob as a transfer left it; None (and nothing there) where its content is wrong."""
        # The process that moved it here may have been killed before its fsync.
        self._fs.sync_dir(self._at.blob(digest).parent)
        blob = noted or self._shelf.prove(digest)
        if blob.sha256 == digest:
            return blob
        reason = f"blob {digest} holds what has the sha256 {blob.sha256}"
        self._put_away(Intent(digest, reason, now, ()))
        return None

    def _put_away(self, intent: Intent) -> tuple[tuple[Revision, ...], Aside | None]:
        leftovers, aside = self._shelf.quarantine(intent)
        self._count(intent.digest, None)
        if aside is not None:
            self._asides[aside.name] = aside
        return leftovers, aside

    def commit_blob(self, key: RevisionKey, index: int, blob: Blob) -> None:
        """Durably file a finished part, which its worker has proven, synced and sealed."""
        part, target = self._at.part(key, index), self._at.blob(blob.sha256)
        there_bytes = self._fs.size_bytes(target)
        if there_bytes is None:
            part_bytes = self._fs.size_bytes(part)
            if part_bytes != blob.size_bytes:
                raise _lost(f"{part} has {part_bytes} bytes where {blob.size_bytes} were proven")
            self._fs.rename(part, target)
        elif there_bytes == blob.size_bytes:
            self._fs.unlink(part, missing_ok=True)
        else:
            raise _damaged(target, there_bytes, blob)
        self._fs.sync_dir(target.parent)
        self._count(blob.sha256, blob.size_bytes)

    def commit_artifact(
        self, manifest: Manifest, revision: Revision, now: float, rate_bytes_per_s: float = 0.0
    ) -> Artifact:
        """The artifact, durably proven once this returns. Committing again what is committed is fine.
        ``rate_bytes_per_s`` is noted: what it took from its origin, 0 for unknown.

        Raises CachedError: ``BLOB_MISSING`` (temporary) when a blob was dropped in between.
        """
        assert manifest.revision == revision.key and manifest.ref == revision.ref
        assert manifest.commit == revision.commit
        files = [(f.path, f.blob.size_bytes, f.blob.sha256) for f in manifest.files]
        assert manifest.id == artifact_id(files), manifest.id
        check_paths([path for path, _, _ in files])
        blobs = manifest.distinct_blobs()
        for blob in blobs:
            size_bytes = self._fs.size_bytes(self._at.blob(blob.sha256))
            if size_bytes != blob.size_bytes:
                raise _lost(f"blob {blob.sha256} has {size_bytes} bytes where {blob.size_bytes} were proven")
        before = self._entries.get(manifest.id)
        if before is None:
            self._shelf.build_tree(manifest.id, ((f.path, f.blob.sha256) for f in manifest.files))
            # Or a power cut could bring back a tree of the same name that was removed earlier.
            self._fs.sync_dir(self._at.trees)
        if before is None or (manifest.attested and not before.attested):
            self._shelf.put(self._at.origin(manifest.id), encode(revision))
            replace_file(self._fs, self._at.manifest(manifest.id), encode(manifest))
            self._index(manifest.id, manifest.attested, (blob.sha256 for blob in blobs))
            self._hub.learn(manifest.id, origin_of(manifest.ref, manifest.commit, manifest.id))
        self.touch(manifest.id, now)
        self.put_note(note_of(revision, manifest.id, now, rate_bytes_per_s))
        remove_tree(self._fs, self._at.transfer(revision.key))
        sizes = images(
            [f.blob.sha256 for f in manifest.files], ((x.file, x.size_bytes) for x in manifest.tensors)
        )
        return Artifact(manifest.id, tuple((b.sha256, b.size_bytes) for b in blobs), now, sizes)

    def discard(self, key: RevisionKey, drop: tuple[Digest, ...]) -> None:
        """Remove what a transfer left, and these blobs unless an artifact has them by now; also those that it
        committed of files whose digests nobody knew beforehand, which ``drop`` cannot name.

        Raises CachedError ``INGEST_BUSY`` (temporary) while a worker still writes.
        """
        found = self._found(key)
        self._shelf.remove_transfer(key)
        self._drop((*drop, *found))

    def _found(self, key: RevisionKey) -> tuple[Digest, ...]:
        """The digests that a transfer found out for files that nobody attested."""
        record = self._at.revision(key)
        revision = decode(self._fs.read_file(record), Revision) if self._fs.size_bytes(record) else None
        if revision is None:
            return ()
        bare = [index for index, spec in enumerate(revision.files) if spec.sha256 is None]
        found = (self._shelf.journal(key, index).done for index in bare)
        return tuple(digest for digest in found if digest is not None)

    # --- artifacts --------------------------------------------------------------------------

    def evict(self, artifact: ArtifactId, drop: tuple[Digest, ...]) -> None:
        """Take an artifact down, then these blobs unless another artifact has them by now."""
        self._shelf.unlist([artifact])
        self._forget(artifact)
        remove_tree(self._fs, self._at.tree(artifact))
        self._hub.forget([artifact])
        self._drop(drop)

    def _drop(self, digests: tuple[Digest, ...]) -> None:
        for digest in digests:
            if digest not in self._owners:
                self._fs.unlink(self._at.blob(digest), missing_ok=True)
                self._count(digest, None)

    def quarantine(
        self, artifacts: tuple[ArtifactId, ...], digest: Digest, reason: str, now: float
    ) -> Withdrawn:
        """Take down these artifacts and whichever else has the content, then put the blob away.

        Their intact contents stay as the transfers in the answer, ready for fetching the rest anew.
        """
        down = tuple(sorted({*artifacts, *self._owners.get(digest, ())}))
        # First of all, and durably: the intent says nothing of where else the content is shown.
        self._hub.forget(down)
        leftovers, aside = self._put_away(Intent(digest, reason, now, down))
        for artifact in down:
            self._forget(artifact)
        return Withdrawn(down, leftovers, aside)

    def purge(self, name: str) -> None:
        """Remove a content from quarantine. The record of why stays, while it is among the newest."""
        self._shelf.purge(name)
        self._asides.pop(name, None)
        self._shelf.trim_records(self._asides)

    def manifest(self, artifact: ArtifactId) -> Manifest:
        """Raises CachedError: NOT_FOUND, or DATA_LOSS when it cannot be read."""
        manifest = decode(self.manifest_bytes(artifact), Manifest)
        if manifest is None:
            raise permanent(
                ErrorKind.DATA_LOSS,
                "BAD_MANIFEST",
                f"{self._at.manifest(artifact)} is not the record of an artifact any more",
                "evict the artifact and fetch it again; check the disk",
            )
        return manifest

    def manifest_bytes(self, artifact: ArtifactId) -> bytes:
        """The manifest as JSON; any thread may ask. Raises CachedError NOT_FOUND."""
        if artifact not in self._entries:
            raise permanent(
                ErrorKind.NOT_FOUND,
                "NO_ARTIFACT",
                f"{artifact} is not on this node's disk",
                "prefetch or acquire its ref",
            )
        return self._fs.read_file(self._at.manifest(artifact))

    def tree_path(self, artifact: ArtifactId) -> Path:
        """Where a committed artifact's files have their own names; absolute."""
        return self._at.tree(artifact)

    def touch(self, artifact: ArtifactId, now: float) -> None:
        """Note the last use, for evicting the coldest first; nothing to do for what is gone. Not durable."""
        if artifact in self._entries:
            self._fs.touch(self._at.manifest(artifact), now)

    # --- claims and notes -------------------------------------------------------------------

    def put_claim(self, claim: Claim) -> None:
        """Durably make or replace a claim."""
        replace_file(self._fs, self._at.claim(claim.id), encode(claim))

    def delete_claim(self, claim: ClaimId) -> None:
        """Durably end a claim; one that is gone is fine."""
        path = self._at.claim(claim)
        self._fs.unlink(path, missing_ok=True)
        self._fs.sync_dir(path.parent)

    def put_note(self, note: Note) -> None:
        """Remember a resolution, and show it. Not durable: a lost one is made again from the manifest.

        Nothing to do for what was taken down since.
        """
        if note.artifact not in self._entries:
            return
        self._shelf.put(self._at.note(note.ref), encode(note))
        self._notes[note.ref] = note
        self._hub.learn(note.ref, noted(note))
        self._hub.show(note.ref)

    # --- scrubbing --------------------------------------------------------------------------

    def blobs_after(self, cursor: str, most_bytes: int) -> tuple[tuple[str, Digest, int], ...]:
        """(path, sha256, size in bytes) of the next contents in the order of their digests: at least one, if
        there is one, and no more than come to ``most_bytes``."""
        later = heapq.nsmallest(MOST_SCRUBBED, (digest for digest in self._sizes if digest > cursor))
        found: list[tuple[str, Digest, int]] = []
        room_bytes = most_bytes
        for digest in later:
            room_bytes -= self._sizes[digest]
            if found and room_bytes < 0:
                break
            found.append((str(self._at.blob(digest)), digest, self._sizes[digest]))
        return tuple(found)

    def has_blob(self, digest: Digest) -> bool:
        """Whether this content is meant to be here."""
        return digest in self._sizes

    def scrub_mark(self) -> ScrubMark:
        """How far the scrubber was; anew where nothing readable tells."""
        path = self._at.scrub
        return (
            decode(self._fs.read_file(path), ScrubMark) if self._fs.size_bytes(path) else None
        ) or ScrubMark()

    def put_scrub_mark(self, mark: ScrubMark) -> None:
        """Not durable: what a power cut takes back is read once more."""
        self._shelf.put(self._at.scrub, encode(mark))

    # --- room -------------------------------------------------------------------------------

    def room(self) -> Room:
        """How full the file system is, and with how much of ours."""
        # Ours first: what a transfer takes in between is then missing from both, which errs on the safe side.
        beside = (self._fs.allocated_bytes(place) for place in (self._at.ingest, self._at.quarantine))
        own_bytes = self._blob_bytes + sum(beside)
        total_bytes, free_bytes = self._fs.disk_bytes(self._at.root)
        return Room(own_bytes, total_bytes, free_bytes)


def _check_version(fs: Fs, at: Layout) -> None:
    if fs.size_bytes(at.version) is None:
        strangers = [name for name in fs.list_dir(at.root) if name not in EMPTY_ENOUGH]
        if strangers:
            raise _not_ours(f"{at.root} is no store: it holds {strangers[0]!r} and no VERSION")
    elif (found := fs.read_file(at.version)) != VERSION:
        words = found[:40].decode("utf-8", "replace").strip()
        known = VERSION.decode().strip()
        raise _not_ours(f"{at.version} says {words!r}; this program knows version {known}")


def _not_ours(message: str) -> CachedError:
    hint = "give the daemon an empty data directory, or run the version that made this one"
    return permanent(ErrorKind.PRECONDITION, "STORE_VERSION", message, hint)


def _make_directories(fs: Fs, at: Layout) -> None:
    """Make all directories at once and durably, so that no later step has to. VERSION comes first:
    directories without it would be somebody else's."""
    if fs.size_bytes(at.version) is None:
        fs.sync_dir(at.root.parent)
        replace_file(fs, at.version, VERSION)
    fs.sync_dir(at.root)
    for directory in (at.blobs, at.artifacts, at.trees, at.hub):
        fs.make_dir(directory)
    for directory in (at.refs, at.claims, at.ingest, at.quarantine):
        fs.make_dir(directory, PRIVATE_MODE)  # refs and claims may tell what others should not read
    there = set(fs.list_dir(at.blobs))
    for name in (f"{number:02x}" for number in range(256)):
        if name not in there:
            fs.make_dir(at.blobs / name)
    for directory in (at.blobs, at.blobs.parent, at.root):
        fs.sync_dir(directory)


def _damaged(path: Path, size_bytes: int, blob: Blob) -> CachedError:
    return permanent(
        ErrorKind.DATA_LOSS,
        "BLOB_DAMAGED",
        f"{path} has {size_bytes} bytes where {blob.size_bytes} were proven",
        "run `cachectl verify --all`, which quarantines it, and check the disk",
    )


def _lost(message: str) -> CachedError:
    return temporary(
        "BLOB_MISSING", message, "it is fetched again; nothing to do", RETRY_FETCH_S, ErrorKind.FAILED
    )
