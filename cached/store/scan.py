"""The start: makes disk and memory agree on what is proven, and finishes what a crash interrupted.

Owns what is kept and what goes: manifests whose blobs are all there, blobs that an artifact or a
transfer names, trees, notes and the Hub's cache as the manifests say. What is damaged is put aside with
a reason; what is ours and unneeded is removed; what is not ours is left alone and reported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from cached.blocks import images
from cached.durable import is_temporary_name, remove_tree
from cached.model import (
    Artifact,
    ArtifactId,
    Aside,
    CachedError,
    Claim,
    Digest,
    Note,
    Ref,
    Revision,
    RevisionKey,
    artifact_id,
    hub_parts,
    is_digest,
)
from cached.store.hub import HubView, Sighting, noted, origin_of
from cached.store.layout import NEW_TREE, PENDING, Head, Ingest, Intent, Scan, TakenDown, decode, encode
from cached.store.shelf import Shelf, check_paths, set_aside_at


@dataclass(frozen=True, slots=True)
class _Blob:
    sha256: Digest
    size_bytes: int


@dataclass(frozen=True, slots=True)
class _File:
    path: str
    blob: _Blob


@dataclass(frozen=True, slots=True)
class _Tensor:
    file: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class _Manifest:
    """A manifest without what makes it long: a start reads them all, chunks and names it does not need."""

    id: ArtifactId
    ref: Ref
    revision: RevisionKey
    attested: bool
    files: tuple[_File, ...]
    commit: str = ""
    tensors: tuple[_Tensor, ...] = ()


class _Found(NamedTuple):
    manifest: _Manifest
    used_at: float
    images: tuple[tuple[Digest, int], ...]


def scan(shelf: Shelf, hub: HubView, now: float) -> Scan:
    """Look at everything once. Raises CachedError where the disk refuses, FsyncFailed where it lies."""
    return _Scan(shelf, hub, now).run()


class _Scan:
    """One start. The steps run in the order of ``run``; each relies on those before it."""

    def __init__(self, shelf: Shelf, hub: HubView, now: float) -> None:
        self._shelf, self._fs, self._at = shelf, shelf.fs, shelf.at
        self._hub, self._now = hub, now
        self._found: dict[ArtifactId, _Found] = {}
        self._notes: dict[Ref, Note] = {}
        self._sizes: dict[Digest, int] = {}
        self._kept: set[Digest] = set()
        self._quarantined: list[TakenDown] = []
        self._problems: list[str] = []

    def run(self) -> Scan:
        self._settle()
        self._read_notes()
        self._finish_quarantines()
        self._read_manifests()
        self._read_blob_sizes()
        self._check_blobs()
        self._mend_trees()
        self._mend_notes()
        self._mend_hub()
        ingests = tuple(self._ingests())
        self._remove_unneeded()
        claims, asides = tuple(self._claims()), tuple(self._asides())
        found = [self._found[key] for key in sorted(self._found)]
        return Scan(
            artifacts=tuple(_artifact(f) for f in found),
            heads=tuple(_head(f.manifest) for f in found),
            notes=tuple(self._notes.values()),
            claims=claims,
            ingests=ingests,
            quarantined=tuple(self._quarantined),
            problems=tuple(self._problems),
            asides=asides,
            blobs=tuple((digest, size) for digest, size in self._sizes.items() if digest in self._kept),
        )

    def _settle(self) -> None:
        # A process that was killed between a rename or an unlink and its fsync left a name that this
        # scan sees and a power cut could still take back. What is decided upon below has to stay so.
        for directory in (self._at.artifacts, self._at.claims, self._at.quarantine):
            self._fs.sync_dir(directory)

    def _finish_quarantines(self) -> None:
        for name in self._fs.list_dir(self._at.quarantine):
            if name.startswith(PENDING):
                intent = self._shelf.finish_quarantine(self._at.quarantine / name)
                for artifact in intent.artifacts if intent else ():
                    self._report(artifact, intent.reason if intent else "")

    def _report(self, artifact: ArtifactId, reason: str) -> None:
        found = self._found.get(artifact)
        noted = (ref for ref, note in self._notes.items() if note.artifact == artifact)
        ref = found.manifest.ref if found else next(noted, Ref(""))
        self._quarantined.append(TakenDown(artifact, ref, reason))

    # --- manifests and their blobs ----------------------------------------------------------

    def _records(self, directory: Path, suffix: str) -> Iterator[tuple[str, Path]]:
        """(stem, path) of the records in a directory; clears scratch files, reports strangers."""
        for name in self._fs.list_dir(directory):
            path = directory / name
            if is_temporary_name(name):
                self._fs.unlink(path)
            elif name.endswith(suffix) and self._fs.size_bytes(path) is not None:
                yield name.removesuffix(suffix), path
            elif not (directory == self._at.artifacts and name.endswith(".revision")):
                self._problems.append(f"{path} is not ours; it was left alone")

    def _read_manifests(self) -> None:
        for stem, path in self._records(self._at.artifacts, ".json"):
            if not is_digest(stem):
                self._problems.append(f"{path} is not ours; it was left alone")
                continue
            artifact = ArtifactId(f"sha256:{stem}")
            manifest = decode(self._fs.read_file(path), _Manifest)
            wrong = _fault(manifest, artifact)
            if manifest is not None and wrong is None:
                self._found[artifact] = self._found_at(path, manifest)
            else:
                reason = f"{path.name}: {wrong}"
                self._report(artifact, reason)
                self._shelf.set_aside(path, f"manifest-{stem}", reason, self._now)

    def _found_at(self, path: Path, manifest: _Manifest) -> _Found:
        sizes = images(
            [f.blob.sha256 for f in manifest.files], ((x.file, x.size_bytes) for x in manifest.tensors)
        )
        slim = replace(self._with_commit(manifest), tensors=())
        return _Found(slim, self._fs.modified_at(path), sizes)

    def _with_commit(self, manifest: _Manifest) -> _Manifest:
        """Records from before manifests had a commit: the revision that lies beside them has it."""
        if manifest.commit or hub_parts(manifest.ref) is None:
            return manifest
        path = self._at.origin(manifest.id)
        revision = decode(self._fs.read_file(path), Revision) if self._fs.size_bytes(path) else None
        if revision is None or revision.key != manifest.revision:
            return manifest
        return replace(manifest, commit=revision.commit)

    def _read_blob_sizes(self) -> None:
        for name, size_bytes in self._fs.files_under(self._at.blobs).items():
            directory, _, digest = name.partition("/")
            if is_digest(digest) and digest[:2] == directory:
                self._sizes[Digest(digest)] = size_bytes
            else:
                self._problems.append(f"{self._at.blobs / name} is not ours; it was left alone")

    def _check_blobs(self) -> None:
        owners: dict[Digest, list[ArtifactId]] = {}
        damaged: dict[Digest, str] = {}
        for artifact, (manifest, _, _) in self._found.items():
            for blob in {file.blob for file in manifest.files}:
                owners.setdefault(blob.sha256, []).append(artifact)
                size_bytes = self._sizes.get(blob.sha256)
                if size_bytes is None:
                    damaged[blob.sha256] = f"blob {blob.sha256} is missing"
                elif size_bytes != blob.size_bytes:
                    wrong = f"blob {blob.sha256} has {size_bytes} bytes where {blob.size_bytes} were proven"
                    damaged[blob.sha256] = wrong
        for digest, reason in damaged.items():
            self._take_down(digest, reason, tuple(sorted(set(owners[digest]))))

    def _take_down(self, digest: Digest, reason: str, owners: tuple[ArtifactId, ...]) -> None:
        if self._sizes.pop(digest, None) is None:
            self._shelf.take_down(owners, digest)
        else:
            self._shelf.quarantine(Intent(digest, reason, self._now, owners))
        for artifact in owners:
            self._report(artifact, reason)
            self._found.pop(artifact, None)

    # --- what follows from manifests --------------------------------------------------------

    def _mend_trees(self) -> None:
        for name in self._fs.list_dir(self._at.trees):
            known = name.startswith(NEW_TREE) or is_digest(name)
            if not known:
                self._problems.append(f"{self._at.trees / name} is not ours; it was left alone")
            elif ArtifactId(f"sha256:{name}") not in self._found:
                remove_tree(self._fs, self._at.trees / name)
        for artifact, (manifest, _, _) in self._found.items():
            tree = self._at.tree(artifact)
            if not self._fs.is_dir(tree) or self._fs.files_under(tree) != self._files_of(artifact):
                self._shelf.build_tree(artifact, ((f.path, f.blob.sha256) for f in manifest.files))

    def _read_notes(self) -> None:
        for stem, path in self._records(self._at.refs, ".json"):
            note = decode(self._fs.read_file(path), Note)
            if note is not None and path == self._at.note(note.ref):
                self._notes[note.ref] = note
            elif is_digest(stem):
                self._fs.unlink(path)  # a power cut can empty a note; it is made again below

    def _mend_notes(self) -> None:
        for ref in [ref for ref, note in self._notes.items() if note.artifact not in self._found]:
            self._fs.unlink(self._at.note(ref))
            del self._notes[ref]
        for found in sorted(self._found.values(), key=lambda f: f.used_at, reverse=True):
            m = found.manifest
            note = self._notes.get(m.ref)
            if note is None:
                # Resolved long ago, for all anyone knows: whoever cares asks the origin soon.
                self._put_note(Note(m.ref, m.revision, m.id, m.attested, 0.0, m.commit))
            elif m.commit and not note.commit and note.revision == m.revision:
                self._put_note(replace(note, commit=m.commit))

    def _put_note(self, note: Note) -> None:
        self._shelf.put(self._at.note(note.ref), encode(note))
        self._notes[note.ref] = note

    def _mend_hub(self) -> None:
        known: dict[str, Sighting | None] = {}
        for artifact, (manifest, _, _) in self._found.items():
            known[artifact] = origin_of(manifest.ref, manifest.commit, artifact)
        known |= {ref: noted(note) for ref, note in self._notes.items()}
        shown = {key: sighting for key, sighting in known.items() if sighting is not None}
        for path in self._hub.mend(shown, self._files_of):
            self._problems.append(f"{path} is not ours; it was left alone")

    def _files_of(self, artifact: ArtifactId) -> dict[str, int]:
        return {file.path: file.blob.size_bytes for file in self._found[artifact].manifest.files}

    # --- transfers, claims, and the rest ----------------------------------------------------

    def _ingests(self) -> Iterator[Ingest]:
        owned = {file.blob.sha256 for found in self._found.values() for file in found.manifest.files}
        for name in self._fs.list_dir(self._at.ingest):
            if is_temporary_name(name):
                remove_tree(self._fs, self._at.ingest / name)
                continue
            if not is_digest(name):
                self._problems.append(f"{self._at.ingest / name} is not ours; it was left alone")
                continue
            revision = self._revision(RevisionKey(name))
            if revision is not None:
                blobs = self._blobs_of(revision)
                self._kept |= blobs
                have_bytes = self._part_bytes(revision.key) + sum(self._sizes[d] for d in blobs - owned)
                yield Ingest(revision, have_bytes, self._ran_at(revision.key))
        self._kept |= owned

    def _revision(self, key: RevisionKey) -> Revision | None:
        path = self._at.revision(key)
        revision = decode(self._fs.read_file(path), Revision) if self._fs.size_bytes(path) else None
        if revision is not None and revision.key == key:
            return revision
        try:
            self._shelf.remove_transfer(key)
        except CachedError as error:
            # A worker of the daemon before this one has not ended yet; the next start removes it.
            self._problems.append(f"{self._at.transfer(key)} has no readable revision: {error}")
        return None

    def _blobs_of(self, revision: Revision) -> set[Digest]:
        named = (
            spec.sha256 or self._shelf.journal(revision.key, index).done
            for index, spec in enumerate(revision.files)
        )
        return {digest for digest in named if digest is not None and digest in self._sizes}

    def _part_bytes(self, key: RevisionKey) -> int:
        files = self._fs.files_under(self._at.transfer(key))
        return sum(size_bytes for name, size_bytes in files.items() if name.endswith(".part"))

    def _ran_at(self, key: RevisionKey) -> float:
        """When the transfer last wrote something; clears scratch files on the way."""
        directory, at = self._at.transfer(key), 0.0
        for name in self._fs.list_dir(directory):
            if is_temporary_name(name):
                remove_tree(self._fs, directory / name)
            elif self._fs.size_bytes(directory / name) is not None:
                at = max(at, self._fs.modified_at(directory / name))
        return at

    def _asides(self) -> Iterator[Aside]:
        """Last, when nothing more is set aside by this start."""
        for name in self._fs.list_dir(self._at.quarantine):
            if not self._fs.is_dir(self._at.quarantine / name) or set_aside_at(name) is None:
                self._problems.append(f"{self._at.quarantine / name} is not ours; it was left alone")
            elif (aside := self._shelf.aside(name)) is not None:
                yield aside

    def _remove_unneeded(self) -> None:
        for digest in self._sizes.keys() - self._kept:
            self._fs.unlink(self._at.blob(digest))
        for name in self._fs.list_dir(self._at.artifacts):
            stem, _, suffix = name.partition(".")
            if suffix == "revision" and ArtifactId(f"sha256:{stem}") not in self._found:
                self._fs.unlink(self._at.artifacts / name)

    def _claims(self) -> Iterator[Claim]:
        for stem, path in self._records(self._at.claims, ".json"):
            claim = decode(self._fs.read_file(path), Claim)
            if claim is not None and claim.id == stem:
                yield claim
            else:
                reason = f"{path} is not the record of a claim; it was moved to {self._at.quarantine}"
                self._problems.append(reason)
                self._shelf.set_aside(path, f"claim-{stem}", reason, self._now)


def _fault(manifest: _Manifest | None, artifact: ArtifactId) -> str | None:
    """What is wrong with a manifest that is filed under this id."""
    if manifest is None:
        return "this is not the record of an artifact"
    files = [(f.path, f.blob.size_bytes, f.blob.sha256) for f in manifest.files]
    if not manifest.id == artifact == artifact_id(files):
        return "its files do not add up to its id"
    if not all(is_digest(digest) for _, _, digest in files):
        return "it names a blob by something that is no digest"
    try:
        check_paths([path for path, _, _ in files])
    except CachedError as error:
        return str(error)
    return None


def _artifact(found: _Found) -> Artifact:
    blobs = {f.blob.sha256: f.blob.size_bytes for f in found.manifest.files}
    return Artifact(found.manifest.id, tuple(blobs.items()), found.used_at, found.images)


def _head(manifest: _Manifest) -> Head:
    return Head(manifest.id, manifest.ref, manifest.revision, manifest.attested)
