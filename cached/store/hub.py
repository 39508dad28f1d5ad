"""``hub/``: what came from the Hugging Face Hub, laid out as ``huggingface_hub`` looks for it offline.

Owns which snapshots and refs follow from manifests and notes, and their coming and going. A snapshot is an
artifact's tree once more, under the commit's name; a ref is a file that holds a commit. Nothing here is the
only record of anything, and every start checks it. Not for two threads at once.

Up: snapshot, then ref; both after the manifest. Down: ref, then snapshot; both before the blobs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cached.durable import FILE_MODE, remove_tree
from cached.model import ArtifactId, Note, Ref, hub_parts
from cached.store.layout import HUB_SCRATCH, NEW_TREE, hub_folder_name, hub_repo, is_commit
from cached.store.shelf import Shelf

WRONG = ArtifactId("")
"""The artifact of a snapshot that stands and should not, or not like that."""
COMMIT_CHARS = 40


@dataclass(frozen=True, slots=True)
class Sighting:
    """A commit of a repository is this artifact; ``name`` is the branch or tag that it was at that time."""

    repo: str
    commit: str
    artifact: ArtifactId
    name: str = ""
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class _Shown:
    """What stands, or should, in one repository's folder: artifacts by commit, commits by branch or tag."""

    snapshots: dict[str, ArtifactId]
    refs: dict[str, str]


def origin_of(ref: Ref, commit: str, artifact: ArtifactId) -> Sighting | None:
    """What an artifact was fetched as; None where that does not show here."""
    parts = hub_parts(ref)
    # A name that could be two repositories' is none that huggingface_hub takes.
    if parts is None or not is_commit(commit) or hub_repo(hub_folder_name(parts[0])) != parts[0]:
        return None
    return Sighting(parts[0], commit, artifact)


def noted(note: Note) -> Sighting | None:
    """What a note says; None where that does not show here."""
    origin, parts = origin_of(note.ref, note.commit, note.artifact), hub_parts(note.ref)
    if origin is None or parts is None:
        return None
    return Sighting(origin.repo, origin.commit, origin.artifact, parts[1], note.resolved_at)


class HubView:
    """The directory ``hub/``, and what is known of the Hub. Made empty; ``mend`` comes before all else."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf, self._fs, self._at = shelf, shelf.fs, shelf.at
        self._known: dict[str, Sighting] = {}
        self._keys: dict[str, set[str]] = {}
        self._shown: dict[str, _Shown] = {}
        self._unsynced: set[Path] = set()

    # --- what is known ----------------------------------------------------------------------

    def learn(self, key: Ref | ArtifactId, sighting: Sighting | None) -> None:
        """Know this under ``key`` from now on, instead of what was known there: shown by ``show``."""
        before = self._known.pop(key, None)
        if before is not None:
            self._keys[before.repo].discard(key)
        if sighting is not None:
            self._known[key] = sighting
            self._keys.setdefault(sighting.repo, set()).add(key)

    def show(self, ref: Ref) -> None:
        """Have the folder of this ref's repository show what is known."""
        parts = hub_parts(ref)
        if parts is not None and parts[0] in self._keys:
            self._update(parts[0])
            self._settle()

    def forget(self, artifacts: Collection[ArtifactId]) -> None:
        """Take everything down that leads to these artifacts, durably."""
        gone = {key: s.repo for key, s in self._known.items() if s.artifact in artifacts}
        for key in gone:
            self._keys[self._known.pop(key).repo].discard(key)
        for repo in sorted(set(gone.values())):
            self._update(repo)
        self._settle()

    def _wanted(self, repo: str) -> _Shown:
        """The newest resolution has the last word on what a commit or a branch is."""
        snapshots: dict[str, ArtifactId] = {}
        refs: dict[str, str] = {}
        known = (self._known[key] for key in self._keys.get(repo, ()))
        for s in sorted(known, key=lambda s: (s.at, s.name, s.artifact), reverse=True):
            snapshots.setdefault(s.commit, s.artifact)
            # A tag ``a`` and a branch ``a/b`` can both be; a file and a directory of one name cannot.
            if s.name and s.name != s.commit and not _clashes(s.name, refs):
                refs.setdefault(s.name, s.commit)
        return _Shown(snapshots, refs)

    # --- coming and going -------------------------------------------------------------------

    def _update(self, repo: str) -> None:
        """Turn what stands into what should, keeping count of what was done in case the disk refuses."""
        have, want = self._shown.setdefault(repo, _Shown({}, {})), self._wanted(repo)
        for name in have.refs.keys() - want.refs.keys():
            self._remove_ref(repo, name)
            del have.refs[name]
        for commit, artifact in want.snapshots.items():
            if have.snapshots.get(commit) != artifact:
                have.snapshots[commit] = WRONG
                self._build(repo, commit, artifact)
                have.snapshots[commit] = artifact
        for name, commit in want.refs.items():
            if have.refs.get(name) != commit:
                self._write_ref(repo, name, commit)
                have.refs[name] = commit
        for commit in have.snapshots.keys() - want.snapshots.keys():
            self._remove(repo, commit)
            del have.snapshots[commit]
        if not have.snapshots:
            self._tidy(repo)
            del self._shown[repo]
            self._keys.pop(repo, None)

    def _build(self, repo: str, commit: str, artifact: ArtifactId) -> None:
        tree, snapshots = self._at.tree(artifact), self._at.snapshots(repo)
        links = {path: tree / path for path in self._fs.files_under(tree)}
        self._fs.make_dir(snapshots)
        new, target = self._at.new_snapshot(repo, commit), self._at.snapshot(repo, commit)
        self._shelf.link_all(links, new, target)
        # Or a power cut could bring back a snapshot of the same name that was removed earlier.
        self._unsynced.update((snapshots, self._at.hub))

    def _remove(self, repo: str, commit: str) -> None:
        remove_tree(self._fs, self._at.snapshot(repo, commit))
        # Or what came back after a power cut could show what was damaged since.
        self._unsynced.add(self._at.snapshots(repo))

    def _write_ref(self, repo: str, name: str, commit: str) -> None:
        scratch, path = self._at.hub_scratch(repo), self._at.hub_refs(repo) / name
        self._fs.make_dir(path.parent)
        self._prune(path)
        self._fs.write_file(scratch, commit.encode(), FILE_MODE)  # no newline: it is read as it is
        self._fs.rename(scratch, path)

    def _remove_ref(self, repo: str, name: str) -> None:
        self._fs.unlink(self._at.hub_refs(repo) / name, missing_ok=True)
        self._prune(self._at.hub_refs(repo))

    def _tidy(self, repo: str) -> None:
        """What shows nothing any more has no folder, unless somebody else put something there."""
        self._prune(self._at.hub_refs(repo))
        for directory in (self._at.snapshots(repo), self._at.hub_folder(repo)):
            self._remove_empty(directory)

    def _prune(self, directory: Path) -> None:
        """Remove directories in which there is no file."""
        if self._fs.is_dir(directory):
            for name in self._fs.list_dir(directory):
                self._prune(directory / name)
            self._remove_empty(directory)

    def _remove_empty(self, directory: Path) -> None:
        if self._fs.is_dir(directory) and not self._fs.list_dir(directory):
            self._fs.rmdir(directory)

    def _settle(self) -> None:
        """Make durable which snapshots there are. Together, for the first one may do it for all."""
        for directory in sorted(self._unsynced):
            if self._fs.is_dir(directory):
                self._fs.sync_dir(directory)
        self._unsynced.clear()

    # --- a start ----------------------------------------------------------------------------

    def mend(
        self, known: Mapping[str, Sighting], files: Callable[[ArtifactId], Mapping[str, int]]
    ) -> list[Path]:
        """Make the directory show what is known, of artifacts with these ``files`` (path to size in bytes).

        Returns what was left alone, because it is not ours.
        """
        self._known, self._keys, self._shown = dict(known), {}, {}
        for key, sighting in known.items():
            self._keys.setdefault(sighting.repo, set()).add(key)
        strangers: list[Path] = []
        for name in self._fs.list_dir(self._at.hub):
            repo = hub_repo(name)
            if repo is None or not self._fs.is_dir(self._at.hub / name):
                strangers.append(self._at.hub / name)
            else:
                folder = self._at.hub / name
                strangers += [folder / path for path in self._look(repo, folder, files)]
        for repo in sorted({*self._keys, *self._shown}):
            self._update(repo)
        self._settle()
        return strangers

    def _look(
        self, repo: str, folder: Path, files: Callable[[ArtifactId], Mapping[str, int]]
    ) -> Iterator[str]:
        """See what stands in a repository's folder. Yields what is not ours, relative to it."""
        have, want = _Shown({}, {}), self._wanted(repo)
        self._shown[repo] = have
        standing = self._fs.files_under(folder)
        if standing.pop(HUB_SCRATCH, None) is not None:
            self._fs.unlink(folder / HUB_SCRATCH)
        snapshots, refs, strangers = _sorted_out(standing)
        yield from strangers
        # An empty directory has no files to be seen by, and huggingface_hub would take it for a snapshot.
        names = self._fs.list_dir(folder / "snapshots") if self._fs.is_dir(folder / "snapshots") else ()
        for name in names:
            found, artifact = snapshots.get(name, {}), want.snapshots.get(name, WRONG)
            if name.startswith(NEW_TREE):
                remove_tree(self._fs, folder / "snapshots" / name)
            elif artifact != WRONG:
                have.snapshots[name] = artifact if found == files(artifact) else WRONG
            elif is_commit(name) and -1 not in found.values():
                have.snapshots[name] = WRONG
            else:  # what huggingface_hub downloads are symbolic links, and ours never are
                yield f"snapshots/{name}"
        theirs = set(names) - have.snapshots.keys()
        for name, size_bytes in refs.items():
            small = 0 <= size_bytes <= COMMIT_CHARS
            commit = self._fs.read_file(folder / "refs" / name).decode("ascii", "replace") if small else ""
            in_the_way = name in want.refs or _clashes(name, want.refs)
            if in_the_way or (small and commit not in theirs):
                have.refs[name] = commit
            else:
                yield f"refs/{name}"


def _sorted_out(found: Mapping[str, int]) -> tuple[dict[str, dict[str, int]], dict[str, int], list[str]]:
    """The files of each snapshot, the refs, and what is neither, of what stands in a repository's folder."""
    snapshots: dict[str, dict[str, int]] = {}
    refs: dict[str, int] = {}
    strangers: list[str] = []
    for path, size_bytes in found.items():
        top, _, rest = path.partition("/")
        name, _, file = rest.partition("/")
        if top == "snapshots" and file:
            snapshots.setdefault(name, {})[file] = size_bytes
        elif top == "refs" and rest:
            refs[rest] = size_bytes
        elif not (top == "snapshots" and rest):
            strangers.append(path)
    return snapshots, refs, strangers


def _clashes(name: str, refs: Iterable[str]) -> bool:
    """Whether one of these is a directory of the other's path."""
    return any(name.startswith(f"{ref}/") or ref.startswith(f"{name}/") for ref in refs)
