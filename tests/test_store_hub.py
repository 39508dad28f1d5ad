"""The Hub's cache as a view of the store: what the real ``huggingface_hub`` finds in it offline, and when."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import hf_hub_download, scan_cache_dir, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError

from cached.durable import RealFs
from cached.model import Note, Ref, RevisionKey, note_of
from tests.storekit import Home, SmallModel, files_of, sha256

C1, C2, C3 = "1" * 40, "2" * 40, "3" * 40
FILES = {"config.json": b"{}", "1_Pooling/config.json": b"[]", "model.safetensors": b"weights"}
M = SmallModel("hf://org/m", FILES, version=C1)
NEWER = SmallModel("hf://org/m", {**FILES, "model.safetensors": b"newer weights"}, version=C2)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(RealFs(), tmp_path / "data")


def found(home: Home, repo: str, revision: str | None = None) -> dict[str, bytes] | None:
    """The files that huggingface_hub finds of a revision; all its ways of looking have to agree."""
    cache = home.at.hub
    try:
        snapshot = Path(snapshot_download(repo, revision=revision, cache_dir=cache, local_files_only=True))
    except LocalEntryNotFoundError:
        assert try_to_load_from_cache(repo, "config.json", cache_dir=cache, revision=revision) is None
        return None
    names = sorted(str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file())
    for name in names:
        one = hf_hub_download(repo, name, revision=revision, cache_dir=cache, local_files_only=True)
        assert one == try_to_load_from_cache(repo, name, cache_dir=cache, revision=revision)
        assert Path(one) == snapshot / name
    return {name: (snapshot / name).read_bytes() for name in names}


def refs(home: Home) -> dict[str, set[str]]:
    """Branches and tags by repository, as huggingface_hub's own scan of the whole cache tells them."""
    cache = scan_cache_dir(home.at.hub)
    assert cache.warnings == []
    return {repo.repo_id: set(repo.refs) for repo in cache.repos}


def note(model: SmallModel, ref: str, commit: str, at: float = 200.0) -> Note:
    return Note(Ref(ref), RevisionKey(sha256(ref.encode())), model.id, True, at, commit)


# --- what is shown --------------------------------------------------------------------------


def test_whatever_leads_to_an_artifact_finds_it(home: Home) -> None:
    home.fetch(M)
    for revision in ("v1", "feature/x", "refs/pr/1", C1):
        home.store.put_note(note(M, f"hf://org/m@{revision}", C1))
    home.store.put_note(note(M, "hf://other/copy@main", C3))
    for again in (False, True):
        for asked in (None, "main", "v1", "feature/x", "refs/pr/1", C1):
            assert found(home, "org/m", asked) == files_of(M)
        assert found(home, "other/copy") == found(home, "other/copy", C3) == files_of(M)
        assert found(home, "org/m", C3) is None
        assert refs(home) == {"org/m": {"main", "v1", "feature/x", "refs/pr/1"}, "other/copy": {"main"}}
        if not again:
            assert home.restart().problems == ()
    home.store.evict(M.id, M.digests)
    assert os.listdir(home.at.hub) == [] and home.blobs() == set()


def test_a_snapshot_is_read_only_hard_links(home: Home) -> None:
    home.fetch(M)
    snapshot = home.at.snapshot("org/m", C1)
    for path in (snapshot, snapshot / "1_Pooling"):
        assert path.stat().st_mode & 0o777 == 0o555
    for name, content in FILES.items():
        assert (snapshot / name).samefile(home.at.blob(sha256(content)))
        assert not (snapshot / name).is_symlink()
    assert (home.at.hub_refs("org/m") / "main").read_bytes() == C1.encode()
    for path in (home.at.hub, home.at.hub_folder("org/m"), home.at.snapshots("org/m")):
        assert path.stat().st_mode & 0o777 == 0o755


def test_a_branch_that_moves_is_followed_and_the_older_commit_stays(home: Home) -> None:
    home.fetch(M)
    home.fetch(NEWER, now=200.0)
    for _ in range(2):
        assert found(home, "org/m") == found(home, "org/m", C2) == files_of(NEWER)
        assert found(home, "org/m", C1) == files_of(M)
        home.restart()
    home.store.evict(M.id, ())
    assert found(home, "org/m", C1) is None and found(home, "org/m") == files_of(NEWER)
    home.store.evict(NEWER.id, ())
    assert os.listdir(home.at.hub) == []


def test_a_commit_without_a_change_of_ours_is_the_same_artifact(home: Home) -> None:
    """Its README changed, which the globs leave out."""
    home.fetch(M)
    home.fetch(SmallModel("hf://org/m", FILES, version=C2), now=200.0)
    assert found(home, "org/m") == found(home, "org/m", C1) == found(home, "org/m", C2) == files_of(M)
    home.store.evict(M.id, ())
    assert os.listdir(home.at.hub) == []


def test_of_two_choices_of_one_commits_files_the_newer_is_shown(home: Home) -> None:
    """The globs in the configuration changed between two refs' resolutions."""
    fewer = SmallModel("hf://org/m@v1", {"config.json": b"{}"}, version=C1)
    home.fetch(M)
    home.fetch(fewer, now=200.0)
    assert found(home, "org/m") == found(home, "org/m", "v1") == files_of(fewer)
    home.store.evict(fewer.id, ())
    assert found(home, "org/m") == files_of(M) and found(home, "org/m", "v1") is None


def test_a_tag_and_a_branch_below_it_do_not_get_into_each_others_way(home: Home) -> None:
    home.fetch(M)
    for at, name in enumerate(("a", "a/b", "a/b/c", "a"), start=200):
        home.store.put_note(note(M, f"hf://org/m@{name}", C1, at))
        assert refs(home) == {"org/m": {"main", name}}
    home.restart()
    assert refs(home) == {"org/m": {"main", "a"}}


def test_what_huggingface_hub_could_not_name_is_not_shown(home: Home) -> None:
    for name in ("hf://a/b--c", "hf://a--b/c", "http://origin/m/"):
        home.fetch(SmallModel(name, FILES, version=C1))
    home.fetch(SmallModel("hf://org/odd", FILES, version="no commit"))
    assert os.listdir(home.at.hub) == []
    assert home.restart().problems == ()


def test_what_was_taken_down_meanwhile_is_not_shown(home: Home) -> None:
    home.store.put_note(note(M, "hf://org/m@main", C1))
    assert os.listdir(home.at.hub) == [] and home.restart().notes == ()


# --- down -----------------------------------------------------------------------------------


def test_a_quarantine_takes_every_snapshot_of_the_content_down(home: Home) -> None:
    home.fetch(M)
    home.fetch(NEWER, now=200.0)
    home.store.put_note(note(M, "hf://other/copy", C3))
    home.store.quarantine((M.id,), sha256(b"weights"), "its sha256 is another", 250.0)
    assert found(home, "org/m", C1) is None and found(home, "org/m") == files_of(NEWER)
    assert refs(home) == {"org/m": {"main"}}
    home.store.quarantine((), sha256(b"{}"), "its sha256 is another", 260.0)
    assert os.listdir(home.at.hub) == []


def test_damage_that_a_start_finds_takes_the_snapshot_down(home: Home) -> None:
    home.fetch(M)
    home.damage(b"weights", b"cut")
    assert len(home.restart().quarantined) == 1
    assert os.listdir(home.at.hub) == []


def test_a_view_that_somebody_removed_does_no_harm(home: Home) -> None:
    home.fetch(M)
    home.fs.rename(home.at.hub_folder("org/m"), home.root / "moved")
    home.store.evict(M.id, ())
    home.fetch(NEWER)
    assert found(home, "org/m") == files_of(NEWER)


# --- what a start mends ---------------------------------------------------------------------


def test_a_view_that_is_gone_or_wrong_is_made_again(home: Home) -> None:
    home.fetch(M)
    home.store.put_note(note(M, "hf://other/copy@v/1", C3))
    snapshot, folder = home.at.snapshot("org/m", C1), home.at.hub_folder("org/m")
    home.fs.chmod(snapshot, 0o755)
    home.fs.unlink(snapshot / "config.json")
    home.fs.write_file(home.at.hub_refs("org/m") / "main", b"")
    home.fs.rename(home.at.hub_folder("other/copy"), home.at.hub / "models--gone--away")
    home.fs.make_dir(folder / "snapshots" / C2)
    home.fs.make_dir(folder / "snapshots" / f".new-{C3}" / "half")
    home.fs.make_dir(folder / "refs" / "left" / "over")
    home.fs.write_file(folder / "refs" / "stale", C2.encode())
    home.fs.write_file(folder / ".ref.tmp", b"12")
    assert home.restart().problems == ()
    assert found(home, "org/m") == found(home, "other/copy", "v/1") == files_of(M)
    assert refs(home) == {"org/m": {"main"}, "other/copy": {"v/1"}}
    assert os.listdir(folder / "snapshots") == [C1]
    home.store.put_note(note(M, "hf://org/m@left", C1))
    assert found(home, "org/m", "left") == files_of(M)


def test_what_is_not_ours_stays_and_is_told(home: Home) -> None:
    """Somebody downloaded to here by huggingface_hub itself, beside what we show and apart from it."""
    home.fetch(M)
    strangers = [home.at.hub / "CACHEDIR.TAG", home.at.hub / "datasets--org--d" / "refs" / "main"]
    for repo in ("org/m", "org/own"):
        folder = home.at.hub_folder(repo)
        blob, link = folder / "blobs" / "ab", folder / "snapshots" / C3 / "config.json"
        for path in (blob, folder / "refs" / "v3", *strangers[:2]):
            home.fs.make_dir(path.parent)
            home.fs.write_file(path, C3.encode())
        home.fs.make_dir(link.parent)
        link.symlink_to("../../blobs/ab")
        strangers += [blob, link, folder / "refs" / "v3"]
    problems = home.restart().problems
    assert all(path.read_text() == C3 for path in strangers)
    assert all(
        any(str(path).startswith(told.split(" is not ours")[0]) for told in problems) for path in strangers
    )
    assert len(problems) == len(strangers)
    assert found(home, "org/m") == files_of(M)
    home.store.evict(M.id, ())
    home.restart()
    assert all(path.read_text() == C3 for path in strangers)
    assert found(home, "org/m", C1) is None


def test_records_from_before_commits_were_written_down_are_shown_too(home: Home) -> None:
    home.fetch(M)
    for path in (home.at.manifest(M.id), home.at.note(M.ref)):
        record = json.loads(path.read_bytes())
        assert record.pop("commit") == C1
        path.write_text(json.dumps(record))
    home.fs.rename(home.at.hub, home.root / "moved")
    notes = home.restart().notes
    assert notes == (note_of(M.revision, M.id, 100.0),)
    assert found(home, "org/m") == files_of(M)


def test_a_lost_note_is_made_again_with_its_commit(home: Home) -> None:
    home.fetch(M)
    home.fs.unlink(home.at.note(M.ref))
    assert home.restart().notes == (replace(note_of(M.revision, M.id, 0.0)),)
    assert found(home, "org/m") == files_of(M)
