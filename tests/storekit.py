"""What the store's tests share: small models, and a worker that delivers them as the real one does."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import xxhash

from cached.durable import Fs
from cached.model import (
    CHUNK_BYTES,
    DISK,
    Artifact,
    ArtifactId,
    Blob,
    Claim,
    ClaimId,
    ClaimKind,
    Digest,
    FileSpec,
    Manifest,
    ManifestFile,
    Ref,
    Revision,
    artifact_id,
    revision_key,
)
from cached.store import Scan, Store
from cached.store.layout import Layout, format_journal


def sha256(content: bytes) -> Digest:
    return Digest(hashlib.sha256(content).hexdigest())


def blob_of(content: bytes) -> Blob:
    pieces = [content[start : start + CHUNK_BYTES] for start in range(0, len(content), CHUNK_BYTES)]
    return Blob(sha256(content), len(content), tuple(xxhash.xxh3_128_hexdigest(piece) for piece in pieces))


class SmallModel:
    """A ref with its files, and what fetching it would make. ``attested`` as its origin would have it.

    ``version`` is that of each file: of a ref of the Hub, the commit.
    """

    def __init__(
        self, name: str, files: Mapping[str, bytes], attested: bool = True, version: str = "etag"
    ) -> None:
        self.ref = Ref(name if "://" in name else f"http://origin/{name}/")
        self.contents = [files[path] for path in sorted(files)]
        specs = tuple(
            FileSpec(path, len(files[path]), sha256(files[path]) if attested else None, version=version)
            for path in sorted(files)
        )
        self.revision = Revision(self.ref, revision_key(self.ref, specs), specs)
        made = tuple(ManifestFile(path, blob_of(files[path])) for path in sorted(files))
        self.id: ArtifactId = artifact_id((f.path, f.blob.size_bytes, f.blob.sha256) for f in made)
        commit = self.revision.commit
        self.manifest = Manifest(self.id, self.ref, self.revision.key, attested, made, (), commit)

    @property
    def digests(self) -> tuple[Digest, ...]:
        return tuple(dict.fromkeys(sha256(content) for content in self.contents))


def deliver(fs: Fs, directory: Path, index: int, content: bytes) -> Blob:
    """What a worker leaves of one finished file: journal, and the part synced and sealed."""
    blob = blob_of(content)
    part = directory / f"{index}.part"
    fs.write_file(directory / f"{index}.journal", format_journal(blob))
    fs.unlink(part, missing_ok=True)  # a sealed one: it may be a committed blob's other name
    fs.write_file(part, content)
    fs.chmod(part, 0o444)
    fs.sync_file(part)
    return blob


def fetch(store: Store, fs: Fs, model: SmallModel, now: float = 100.0) -> Artifact:
    """A whole transfer; what is there already is not delivered again."""
    plan = store.begin_fetch(model.revision, now)
    for index, content in enumerate(model.contents):
        if plan.have[index] is None:
            store.commit_blob(model.revision.key, index, deliver(fs, plan.directory, index, content))
    return store.commit_artifact(model.manifest, model.revision, now)


def pin(name: str, ref: Ref) -> Claim:
    return Claim(ClaimId(name), ClaimKind.PIN, ref, DISK, made_at=1.0)


def renamed(claim: Claim, name: str) -> Claim:
    return replace(claim, id=ClaimId(name))


class Home:
    """One data directory and the means to start over in it."""

    def __init__(self, fs: Fs, root: Path) -> None:
        self.fs, self.root, self.at = fs, root, Layout(root)
        self.store = Store.open(root, fs)
        self.found = self.store.scan(50.0)

    def restart(self, now: float = 200.0) -> Scan:
        self.store.close()
        self.store = Store.open(self.root, self.fs)
        self.found = self.store.scan(now)
        return self.found

    def fetch(self, model: SmallModel, now: float = 100.0) -> None:
        fetch(self.store, self.fs, model, now)

    def blobs(self) -> set[str]:
        return {name.partition("/")[2] for name in self.fs.files_under(self.at.blobs)}

    def tree(self, model: SmallModel) -> dict[str, bytes] | None:
        tree = self.store.tree_path(model.id)
        if not self.fs.is_dir(tree):
            return None
        return {path: self.fs.read_file(tree / path) for path in self.fs.files_under(tree)}

    def damage(self, content: bytes, instead: bytes) -> None:
        """What a sick disk does to a blob: content changes under every name of it."""
        path = self.at.blob(sha256(content))
        self.fs.chmod(path, 0o644)
        self.fs.write_file(path, instead)


def files_of(model: SmallModel) -> dict[str, bytes]:
    return {f.path: content for f, content in zip(model.manifest.files, model.contents, strict=True)}
