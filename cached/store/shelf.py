"""Brings content up and takes it down, in the order in which a crash at any point does no harm.

Owns the sequences: what is written, synced, renamed and removed after what. Keeps nothing in memory
but where the store lies; whatever it needs to know, it is told or reads from disk.

Up: blob, then tree, then manifest; the manifest's rename is the commit point. Down: manifest and the
fsync of its directory, then tree, then blobs. Trees and notes can be made again from manifests, so
they are written without waiting for the disk, and every start checks them. The Hub's cache, ``hub``'s,
comes after the manifest and goes with the tree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import xxhash

from cached.durable import FILE_MODE, RETRY_BUSY_S, Fs, remove_tree, replace_file, temporary_name
from cached.model import (
    CHUNK_BYTES,
    ArtifactId,
    Aside,
    Blob,
    CachedError,
    Digest,
    ErrorKind,
    Manifest,
    Revision,
    RevisionKey,
    check_relative_path,
    permanent,
    temporary,
)
from cached.store.layout import (
    PENDING,
    Intent,
    Journal,
    Layout,
    SetAside,
    decode,
    encode,
    format_journal,
    parse_journal,
)

PRIVATE_MODE = 0o700
TREE_MODE = 0o555
RECORD = "reason.json"
PIECE_BYTES = 1024 * 1024
MOST_RECORDS = 1000
"""Records of quarantined contents that are gone."""
MOST_ALIKE = 10_000
"""Quarantined records of one name; a disk that damages one content more often than this is no disk."""


@dataclass(frozen=True, slots=True)
class Shelf:
    """The store's directory on one file system."""

    fs: Fs
    at: Layout

    # --- small files ------------------------------------------------------------------------

    def put(self, path: Path, data: bytes) -> None:
        """Replace a file so that no reader sees half of it. A power cut may lose or empty it: for what
        can be made again."""
        scratch = temporary_name(path)
        self.fs.write_file(scratch, data, FILE_MODE)
        self.fs.rename(scratch, path)

    def journal(self, key: RevisionKey, index: int) -> Journal:
        path = self.at.journal(key, index)
        return parse_journal(self.fs.read_file(path) if self.fs.size_bytes(path) else b"")

    def manifest(self, artifact: ArtifactId) -> Manifest | None:
        path = self.at.manifest(artifact)
        if self.fs.size_bytes(path) is None:
            return None
        return decode(self.fs.read_file(path), Manifest)

    # --- up ---------------------------------------------------------------------------------

    def prove(self, digest: Digest) -> Blob:
        """Read a blob and say what it really is."""
        whole, chunk, room_bytes = hashlib.sha256(), xxhash.xxh3_128(), CHUNK_BYTES
        chunks: list[str] = []
        size_bytes = 0
        for piece in self.fs.read_pieces(self.at.blob(digest), PIECE_BYTES):
            whole.update(piece)
            size_bytes += len(piece)
            while piece:
                chunk.update(piece[:room_bytes])
                room_bytes, piece = room_bytes - len(piece[:room_bytes]), piece[room_bytes:]
                if room_bytes == 0:
                    chunks.append(chunk.hexdigest())
                    chunk, room_bytes = xxhash.xxh3_128(), CHUNK_BYTES
        if room_bytes < CHUNK_BYTES:
            chunks.append(chunk.hexdigest())
        return Blob(Digest(whole.hexdigest()), size_bytes, tuple(chunks))

    def build_tree(self, artifact: ArtifactId, files: Iterable[tuple[str, Digest]]) -> None:
        """Hard links under the original names, in read-only directories, seen all at once."""
        links = {path: self.at.blob(digest) for path, digest in files}
        self.link_all(links, self.at.new_tree(artifact), self.at.tree(artifact))

    def link_all(self, links: Mapping[str, Path], new: Path, target: Path) -> None:
        """Make ``target`` a directory of these names, built as ``new`` beside it."""
        remove_tree(self.fs, new)
        remove_tree(self.fs, target)
        parents = {new / PurePosixPath(path).parent for path in links}
        for directory in sorted({new, *parents}):
            self.fs.make_dir(directory)
        for path, source in links.items():
            self.fs.link(source, new / path)
        for directory in _with_parents(parents, new):
            self.fs.chmod(directory, TREE_MODE)
        self.fs.rename(new, target)

    # --- down -------------------------------------------------------------------------------

    def take_down(self, artifacts: Collection[ArtifactId], damaged: Digest) -> tuple[Revision, ...]:
        """Artifacts that lost a blob. Their other contents stay, as transfers that only lack that one."""
        leftovers = [self._keep_rest(artifact, damaged) for artifact in artifacts]
        self.unlist(artifacts)
        for artifact in artifacts:
            remove_tree(self.fs, self.at.tree(artifact))
        # Synced, for a tree that came back after a power cut would show the damaged content under the
        # same name as its successor.
        self.fs.sync_dir(self.at.trees)
        return tuple(revision for revision in leftovers if revision is not None)

    def unlist(self, artifacts: Collection[ArtifactId]) -> None:
        """Durably no artifacts any more; nothing else may be removed before this."""
        for artifact in artifacts:
            self.fs.unlink(self.at.manifest(artifact), missing_ok=True)
        self.fs.sync_dir(self.at.artifacts)
        for artifact in artifacts:
            self.fs.unlink(self.at.origin(artifact), missing_ok=True)

    def _keep_rest(self, artifact: ArtifactId, damaged: Digest) -> Revision | None:
        manifest, path = self.manifest(artifact), self.at.origin(artifact)
        revision = decode(self.fs.read_file(path), Revision) if self.fs.size_bytes(path) else None
        if manifest is None or revision is None or len(manifest.files) != len(revision.files):
            return None
        blobs = {file.path: file.blob for file in manifest.files}
        self.fs.make_dir(self.at.transfer(revision.key), PRIVATE_MODE)
        for index, spec in enumerate(revision.files):
            blob = blobs.get(spec.path)
            if blob is not None and blob.sha256 != damaged:
                self.put(self.at.journal(revision.key, index), format_journal(blob))
        self.put(self.at.revision(revision.key), encode(revision))
        return revision

    def remove_transfer(self, key: RevisionKey) -> None:
        """Refused with ``INGEST_BUSY`` (temporary) while a worker writes to it."""
        directory = self.at.transfer(key)
        if not self.fs.is_dir(directory):
            return
        for name in self.fs.list_dir(directory):
            if name.endswith(".part") and self.fs.is_locked(directory / name):
                raise _busy(directory / name)
        remove_tree(self.fs, directory)

    # --- aside ------------------------------------------------------------------------------

    def quarantine(self, intent: Intent) -> tuple[tuple[Revision, ...], Aside | None]:
        """Take artifacts down and put their damaged blob away, with the reason beside it.

        The intent is durable before anything else happens: else a crash midway would leave a damaged
        blob that looks like an unneeded one.
        """
        pending = self._free_name(intent.digest, intent.at)
        self.fs.make_dir(pending, PRIVATE_MODE)
        replace_file(self.fs, pending / RECORD, encode(intent))
        self.fs.sync_dir(self.at.quarantine)
        leftovers = self._finish(pending, intent)
        return leftovers, self.aside(pending.name.removeprefix(PENDING))

    def finish_quarantine(self, pending: Path) -> Intent | None:
        """Go on where a crash stopped a quarantine; None where it stopped before it meant anything."""
        path = pending / RECORD
        intent = decode(self.fs.read_file(path), Intent) if self.fs.size_bytes(path) else None
        if intent is None:
            remove_tree(self.fs, pending)
            return None
        self._finish(pending, intent)
        return intent

    def _finish(self, pending: Path, intent: Intent) -> tuple[Revision, ...]:
        leftovers = self.take_down(intent.artifacts, intent.digest)
        self._move_durably(self.at.blob(intent.digest), pending / "blob")
        self.fs.rename(pending, pending.with_name(pending.name.removeprefix(PENDING)))
        self.fs.sync_dir(self.at.quarantine)
        return leftovers

    def set_aside(self, path: Path, label: str, reason: str, now: float) -> None:
        """Put a record that cannot be read into quarantine."""
        pending = self._free_name(label, now)
        place = pending.with_name(pending.name.removeprefix(PENDING))
        self.fs.make_dir(place, PRIVATE_MODE)
        replace_file(self.fs, place / RECORD, encode(SetAside(path.name, reason, now)))
        self.fs.sync_dir(self.at.quarantine)
        self._move_durably(path, place / path.name)

    def aside(self, name: str) -> Aside | None:
        """What lies in quarantine under this name; None where only the record of it is left."""
        files = self.fs.files_under(self.at.quarantine / name)
        sizes = [size_bytes for path, size_bytes in files.items() if path != RECORD]
        return Aside(name, sum(max(0, size) for size in sizes), set_aside_at(name) or 0.0) if sizes else None

    def purge(self, name: str) -> None:
        """Remove what lies in quarantine under this name, but not the record. Not durable: what a power cut
        brings back is found by the next start."""
        place = self.at.quarantine / name
        for inside in self.fs.list_dir(place) if self.fs.is_dir(place) else ():
            if inside != RECORD:
                remove_tree(self.fs, place / inside)

    def trim_records(self, keep: Collection[str]) -> None:
        """Bound the records of what is gone; ``keep`` are the names that still hold something."""
        names = [name for name in self.fs.list_dir(self.at.quarantine) if name not in keep]
        dated = sorted((at, name) for name in names if (at := set_aside_at(name)) is not None)
        for _, name in dated[: max(0, len(dated) - MOST_RECORDS)]:
            remove_tree(self.fs, self.at.quarantine / name)

    def _move_durably(self, source: Path, target: Path) -> None:
        """Move a file between directories so that no crash leaves it without a name. Can be repeated."""
        moved = target.name in self.fs.list_dir(target.parent)
        if not moved and source.name in self.fs.list_dir(source.parent):
            self.fs.link(source, target)
        self.fs.sync_dir(target.parent)
        self.fs.unlink(source, missing_ok=True)
        self.fs.sync_dir(source.parent)

    def _free_name(self, label: str, now: float) -> Path:
        taken = {name.removeprefix(PENDING) for name in self.fs.list_dir(self.at.quarantine)}
        for second in range(int(now), int(now) + MOST_ALIKE):
            if f"{label}.{second}" not in taken:
                return self.at.quarantine / f"{PENDING}{label}.{second}"
        raise permanent(
            ErrorKind.FAILED,
            "QUARANTINE_FULL",
            f"{self.at.quarantine} holds {MOST_ALIKE} records of {label}",
            "this disk damages what is written to it: look at it, then empty the directory",
        )


def set_aside_at(name: str) -> float | None:
    """When it was quarantined, as its name has it; None for what is not ours."""
    label, _, second = name.rpartition(".")
    return float(second) if label.strip(".") and second.isdecimal() else None


def check_paths(paths: Collection[str]) -> None:
    """Refuse names that cannot stand in one tree together. Raises CachedError (INVALID)."""
    parents: set[str] = set()
    for path in paths:
        check_relative_path(path)
        parents.update(str(parent) for parent in PurePosixPath(path).parents)
    twice = parents.intersection(paths) or (set(paths) if len(set(paths)) != len(paths) else set())
    if twice:
        raise permanent(
            ErrorKind.INVALID,
            "UNSAFE_PATH",
            f"the origin names {min(twice)!r} both as a file and as something else",
            "mend the origin's listing: every name once, and no file where another needs a directory",
        )


def _with_parents(directories: Iterable[Path], top: Path) -> list[Path]:
    """All directories from these up to ``top``, the deepest first."""
    found = {top}
    for directory in directories:
        while directory not in found:
            found.add(directory)
            directory = directory.parent
    return sorted(found, key=lambda directory: -len(directory.parts))


def _busy(path: Path) -> CachedError:
    return temporary(
        "INGEST_BUSY", f"a worker still writes to {path}", "wait until it has ended", RETRY_BUSY_S
    )
