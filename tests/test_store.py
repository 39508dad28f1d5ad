"""The store on a real directory and on the one in memory: what goes up, comes down, and is found again."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cached.durable import Partial, RealFs
from cached.model import (
    CHUNK_BYTES,
    ArtifactId,
    Aside,
    Blob,
    CachedError,
    ClaimId,
    Digest,
    ErrorKind,
    Manifest,
    Note,
    Ref,
    RevisionKey,
)
from cached.store import Scan, Store
from cached.store.layout import Intent, Journal, decode, encode, format_journal, parse_journal
from cached.store.shelf import MOST_RECORDS
from tests.memfs import MemFs
from tests.storekit import Home, SmallModel, blob_of, deliver, fetch, files_of, pin, sha256

SHARED = b"the tokenizer that both have"
A = SmallModel("a", {"config.json": b"{}", "deep/er/model.bin": b"weights of a", "tokenizer": SHARED})
B = SmallModel("b", {"model.bin": b"weights of b", "tokenizer": SHARED})
LOOSE = SmallModel("loose", {"model.bin": b"nobody vouches for this"}, attested=False)


@pytest.fixture(params=["real", "mem"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Home:
    if request.param == "real":
        return Home(RealFs(), tmp_path / "data")
    fs = MemFs()
    return Home(fs, Path("/data"))


def ids(found: Scan) -> set[ArtifactId]:
    return {artifact.id for artifact in found.artifacts}


# --- opening --------------------------------------------------------------------------------


def test_an_empty_store_is_empty_again_after_a_restart(home: Home) -> None:
    assert home.found == Scan((), (), (), (), (), (), ()) == home.restart()
    assert home.fs.read_file(home.root / "VERSION") == b"1\n"


def test_one_directory_has_one_store(home: Home) -> None:
    with pytest.raises(CachedError) as caught:
        Store.open(home.root, home.fs)
    assert caught.value.problem.reason == "STORE_LOCKED"


def test_a_newer_version_and_a_strangers_directory_are_refused_untouched(home: Home) -> None:
    home.store.close()
    home.fs.write_file(home.root / "VERSION", b"2\n")
    home.fs.make_dir(home.root.parent / "photos")
    home.fs.write_file(home.root.parent / "photos" / "cat", b"x")
    for directory, word in ((home.root, "'2'"), (home.root.parent / "photos", "'cat'")):
        with pytest.raises(CachedError) as caught:
            Store.open(directory, home.fs)
        problem = caught.value.problem
        assert (problem.kind, problem.reason) == (ErrorKind.PRECONDITION, "STORE_VERSION")
        assert word in problem.message and problem.hint
    assert home.fs.list_dir(home.root.parent / "photos") == ["cat"]
    home.fs.write_file(home.root / "VERSION", b"1\n")
    home.restart()


def test_a_fresh_file_system_may_be_a_store(home: Home) -> None:
    place = home.root.parent / "mounted"
    home.fs.make_dir(place / "lost+found")
    Store.open(place, home.fs).close()


# --- up -------------------------------------------------------------------------------------


def test_a_fetched_artifact_stands_in_its_tree_and_is_found_again(home: Home) -> None:
    artifact = fetch(home.store, home.fs, A, now=123.0)
    assert artifact.id == A.id and artifact.last_used_at == 123.0
    assert dict(artifact.blobs) == {sha256(c): len(c) for c in A.contents}
    assert home.tree(A) == files_of(A)
    assert home.store.tree_path(A.id).is_absolute()
    assert home.store.manifest(A.id) == A.manifest
    assert decode(home.store.manifest_bytes(A.id), Manifest) == A.manifest
    assert home.fs.list_dir(home.at.ingest) == []
    found = home.restart()
    assert found.artifacts == (artifact,) and found.problems == () and found.quarantined == ()
    assert found.heads[0].ref == A.ref and found.heads[0].revision == A.revision.key
    assert found.notes == (Note(A.ref, A.revision.key, A.id, True, 123.0),)
    assert home.tree(A) == files_of(A)


def test_a_shared_blob_is_stored_once_and_not_fetched_twice(home: Home) -> None:
    home.fetch(A)
    plan = home.store.begin_fetch(B.revision, 110.0)
    assert plan.have == (None, blob_of(SHARED))
    home.fetch(B)
    assert home.blobs() == {*A.digests, *B.digests}
    assert home.tree(B) == files_of(B)


def test_a_transfer_is_taken_up_where_it_was_left(home: Home) -> None:
    plan = home.store.begin_fetch(A.revision, 100.0)
    assert plan.have == (None, None, None)
    blob = deliver(home.fs, plan.directory, 0, A.contents[0])
    home.store.commit_blob(A.revision.key, 0, blob)
    home.store.commit_blob(A.revision.key, 0, blob)
    home.fs.write_file(plan.directory / "1.part", bytes(len(A.contents[1])))
    found = home.restart()
    assert found.artifacts == ()
    assert [ingest.revision for ingest in found.ingests] == [A.revision]
    assert found.ingests[0].have_bytes == len(A.contents[0]) + len(A.contents[1])
    assert home.store.begin_fetch(A.revision, 210.0).have == (blob, None, None)


def test_an_unattested_file_is_not_fetched_again_either(home: Home) -> None:
    plan = home.store.begin_fetch(LOOSE.revision, 100.0)
    blob = deliver(home.fs, plan.directory, 0, LOOSE.contents[0])
    home.store.commit_blob(LOOSE.revision.key, 0, blob)
    home.restart()
    assert home.store.begin_fetch(LOOSE.revision, 210.0).have == (blob,)
    home.store.commit_artifact(LOOSE.manifest, LOOSE.revision, 220.0)
    assert not home.restart().heads[0].attested


@pytest.mark.parametrize("journal", [b"", b"done 00\n", b"0 abc\ntorn"])
def test_a_blob_whose_journal_was_lost_is_proven_by_reading(home: Home, journal: bytes) -> None:
    plan = home.store.begin_fetch(A.revision, 100.0)
    blob = deliver(home.fs, plan.directory, 1, A.contents[1])
    home.store.commit_blob(A.revision.key, 1, blob)
    home.fs.write_file(plan.directory / "1.journal", journal)
    home.restart()
    assert home.store.begin_fetch(A.revision, 210.0).have == (None, blob, None)


def test_a_blob_that_nobody_vouches_for_and_that_is_wrong_is_quarantined(home: Home) -> None:
    plan = home.store.begin_fetch(A.revision, 100.0)
    home.store.commit_blob(A.revision.key, 1, deliver(home.fs, plan.directory, 1, A.contents[1]))
    home.fs.unlink(plan.directory / "1.journal")
    home.damage(A.contents[1], b"WEIGHTS of a")
    assert home.store.begin_fetch(A.revision, 110.0).have == (None, None, None)
    place = home.at.quarantine / f"{sha256(A.contents[1])}.110"
    assert home.fs.read_file(place / "blob") == b"WEIGHTS of a"
    assert sha256(b"WEIGHTS of a") in json.loads(home.fs.read_file(place / "reason.json"))["reason"]
    home.fetch(A)
    assert home.tree(A) == files_of(A)


def test_an_origin_that_lists_a_wrong_size_is_not_believed(home: Home) -> None:
    home.fetch(A)
    lying = replace(A.revision.files[1], size_bytes=5)
    revision = replace(A.revision, key=RevisionKey("ab" * 32), files=(lying,))
    assert home.store.begin_fetch(revision, 110.0).have == (None,)


def test_a_part_of_another_size_is_not_committed(home: Home) -> None:
    plan = home.store.begin_fetch(A.revision, 100.0)
    blob = deliver(home.fs, plan.directory, 1, A.contents[1])
    with pytest.raises(CachedError) as caught:
        home.store.commit_blob(A.revision.key, 1, replace(blob, size_bytes=5))
    assert caught.value.problem.reason == "BLOB_MISSING" and caught.value.problem.temporary
    assert home.blobs() == set()


def test_an_artifact_without_all_its_blobs_is_not_committed(home: Home) -> None:
    home.fetch(A)
    home.store.begin_fetch(B.revision, 110.0)
    with pytest.raises(CachedError) as caught:
        home.store.commit_artifact(B.manifest, B.revision, 120.0)
    assert caught.value.problem.reason == "BLOB_MISSING" and B.digests[0] in str(caught.value)
    assert home.tree(B) is None and ids(home.restart()) == {A.id}


def test_names_that_cannot_stand_together_are_refused(home: Home) -> None:
    for paths in (("a", "a/b"), ("../a", "b"), ("a//b", "c")):
        specs = tuple(replace(A.revision.files[0], path=path) for path in paths)
        with pytest.raises(CachedError) as caught:
            home.store.begin_fetch(replace(A.revision, files=specs), 100.0)
        assert caught.value.problem.reason == "UNSAFE_PATH"


def test_committing_again_is_fine_and_attestation_is_never_lost(home: Home) -> None:
    files = dict(zip(["model.bin"], LOOSE.contents, strict=True))
    vouched = SmallModel("vouched", files)
    assert vouched.id == LOOSE.id
    home.fetch(LOOSE)
    home.fetch(vouched, now=110.0)
    assert home.store.manifest(LOOSE.id).attested
    home.fetch(LOOSE, now=120.0)
    found = home.restart()
    assert [head.attested for head in found.heads] == [True]
    assert {note.ref: note.attested for note in found.notes} == {LOOSE.ref: False, vouched.ref: True}
    assert found.artifacts[0].last_used_at == 120.0


def test_a_file_with_many_chunks_keeps_them_all(home: Home) -> None:
    content = bytes(range(256)) * ((2 * CHUNK_BYTES + 512) // 256)
    big = SmallModel("big", {"model.bin": content, "empty": b""})
    plan = home.store.begin_fetch(big.revision, 100.0)
    for index, piece in enumerate(big.contents):
        home.store.commit_blob(big.revision.key, index, deliver(home.fs, plan.directory, index, piece))
        home.fs.unlink(plan.directory / f"{index}.journal")
    have = home.store.begin_fetch(big.revision, 110.0).have
    assert have == (blob_of(b""), blob_of(content))
    assert have[1] is not None and len(have[1].chunks) == 3 and have[0] == Blob(sha256(b""), 0, ())


# --- down -----------------------------------------------------------------------------------


def test_eviction_keeps_what_others_need(home: Home) -> None:
    home.fetch(A)
    home.fetch(B)
    home.store.evict(A.id, tuple(d for d in A.digests if d != sha256(SHARED)))
    home.store.evict(A.id, ())
    assert home.tree(A) is None and home.blobs() == set(B.digests)
    with pytest.raises(CachedError) as caught:
        home.store.manifest(A.id)
    assert caught.value.problem.kind is ErrorKind.NOT_FOUND
    found = home.restart()
    assert ids(found) == {B.id} and [note.ref for note in found.notes] == [B.ref]
    assert home.fs.list_dir(home.at.artifacts) == [
        f"{B.id.removeprefix('sha256:')}{suffix}" for suffix in (".json", ".revision")
    ]


def test_a_blob_that_another_artifact_got_in_between_is_not_dropped(home: Home) -> None:
    home.fetch(A)
    home.fetch(B)
    home.store.evict(A.id, A.digests)
    home.store.discard(RevisionKey("00" * 32), B.digests)
    assert home.tree(B) == files_of(B) and home.blobs() == set(B.digests)


def test_a_discarded_transfer_leaves_nothing(home: Home) -> None:
    plan = home.store.begin_fetch(A.revision, 100.0)
    home.store.commit_blob(A.revision.key, 0, deliver(home.fs, plan.directory, 0, A.contents[0]))
    deliver(home.fs, plan.directory, 1, A.contents[1])
    home.store.discard(A.revision.key, A.digests)
    home.store.discard(A.revision.key, A.digests)
    assert home.blobs() == set() and home.fs.list_dir(home.at.ingest) == []


def test_a_discarded_transfer_leaves_nothing_of_what_nobody_attested(home: Home) -> None:
    bare = SmallModel("bare", {"a": b"found out", "b": b"never came"}, attested=False)
    plan = home.store.begin_fetch(bare.revision, 100.0)
    home.store.commit_blob(bare.revision.key, 0, deliver(home.fs, plan.directory, 0, bare.contents[0]))
    assert home.blobs() == {sha256(bare.contents[0])}
    home.store.discard(bare.revision.key, ())
    assert home.blobs() == set() and home.fs.list_dir(home.at.ingest) == []


def test_quarantine_takes_every_owner_down_and_keeps_the_rest(home: Home) -> None:
    home.fetch(A)
    home.fetch(B)
    home.damage(SHARED, b"x" * len(SHARED))
    out = home.store.quarantine((A.id,), sha256(SHARED), "its sha256 is another", 150.0)
    assert out.artifacts == tuple(sorted((A.id, B.id)))
    assert {revision.key for revision in out.leftovers} == {A.revision.key, B.revision.key}
    assert set(out.leftovers) == {A.revision, B.revision}
    assert home.tree(A) is None and home.tree(B) is None
    place = home.at.quarantine / f"{sha256(SHARED)}.150"
    assert home.fs.read_file(place / "blob") == b"x" * len(SHARED)
    intent = decode(home.fs.read_file(place / "reason.json"), Intent)
    assert intent is not None and intent.reason == "its sha256 is another"
    plan = home.store.begin_fetch(A.revision, 160.0)
    assert [blob is None for blob in plan.have] == [False, False, True]
    home.fetch(A)
    assert home.tree(A) == files_of(A) and ids(home.restart()) == {A.id}


def test_an_unattested_artifact_is_fetched_anew_as_what_it_was(home: Home) -> None:
    loose = SmallModel("loose2", {"a": b"first", "b": b"second"}, attested=False)
    home.fetch(loose)
    out = home.store.quarantine((loose.id,), sha256(b"first"), "bad", 150.0)
    assert out.leftovers == (loose.revision,)
    assert home.store.begin_fetch(loose.revision, 160.0).have == (None, blob_of(b"second"))


def test_what_lies_in_quarantine_is_told_and_purged_and_its_record_stays(home: Home) -> None:
    home.fetch(A)
    home.fetch(LOOSE)
    (digest,) = LOOSE.digests
    out = home.store.quarantine((LOOSE.id,), digest, "bad", 150.0)
    aside = Aside(f"{digest}.150", len(LOOSE.contents[0]), 150.0)
    assert out.aside == aside
    home.fs.write_file(home.at.claims / "bad.json", b"{")
    set_aside = Aside("claim-bad.300", 1, 300.0)
    assert set(home.restart(now=300.0).asides) == {aside, set_aside}
    home.store.purge(aside.name)
    home.store.purge(aside.name)
    assert home.fs.list_dir(home.at.quarantine / aside.name) == ["reason.json"]
    assert home.restart().asides == (set_aside,)
    assert home.found.problems == ()
    home.store.quarantine((), Digest("ab" * 32), "it is missing", 160.0)
    assert home.store.quarantine((), Digest("ab" * 32), "it is missing", 160.0).aside is None


def test_what_is_found_damaged_before_a_fetch_is_told_too(home: Home) -> None:
    plan = home.store.begin_fetch(A.revision, 100.0)
    home.store.commit_blob(A.revision.key, 1, deliver(home.fs, plan.directory, 1, A.contents[1]))
    home.damage(A.contents[1], b"WEIGHTS of a")
    home.fs.unlink(plan.directory / "1.journal")
    again = home.store.begin_fetch(A.revision, 110.0)
    assert again.have == (None, None, None)
    assert again.asides == (Aside(f"{sha256(A.contents[1])}.110", 12, 110.0),)


def test_records_of_what_is_gone_are_bounded_the_oldest_go(home: Home) -> None:
    for second in range(MOST_RECORDS + 3):
        home.fs.make_dir(home.at.quarantine / f"x.{second}")
    home.fs.write_file(home.at.quarantine / "x.0" / "blob", b"still here")
    home.restart()
    names = home.fs.list_dir(home.at.quarantine)
    assert len(names) == MOST_RECORDS + 1
    assert "x.0" in names and not {"x.1", "x.2"} & set(names) and f"x.{MOST_RECORDS + 2}" in names


def test_a_start_says_when_leftovers_last_grew_and_removes_scratch_files(home: Home) -> None:
    plan = home.store.begin_fetch(A.revision, 100.0)
    deliver(home.fs, plan.directory, 0, A.contents[0])
    for name, at in (("revision.json", 40.0), ("0.journal", 60.0), ("0.part", 77.0)):
        home.fs.touch(plan.directory / name, at)
    home.fs.write_file(plan.directory / ".revision.json.tmp", b"half")
    home.fs.write_file(home.at.ingest / ".x.tmp", b"half")
    (ingest,) = home.restart().ingests
    assert ingest.ran_at == 77.0 and home.found.problems == ()
    assert home.fs.list_dir(home.at.ingest) == [A.revision.key]
    assert home.fs.list_dir(plan.directory) == ["0.journal", "0.part", "revision.json"]


def test_a_measured_rate_is_found_again_and_older_notes_are_read(home: Home) -> None:
    plan = home.store.begin_fetch(LOOSE.revision, 100.0)
    home.store.commit_blob(LOOSE.revision.key, 0, deliver(home.fs, plan.directory, 0, LOOSE.contents[0]))
    home.store.commit_artifact(LOOSE.manifest, LOOSE.revision, 100.0, 5e6)
    (note,) = home.restart().notes
    assert note.rate_bytes_per_s == 5e6
    path = home.at.note(LOOSE.ref)
    record = json.loads(home.fs.read_file(path))
    del record["rate_bytes_per_s"]
    home.fs.write_file(path, json.dumps(record).encode())
    assert home.restart().notes == (replace(note, rate_bytes_per_s=0.0),)


def test_the_same_content_can_be_quarantined_again_within_a_second(home: Home) -> None:
    for _ in range(2):
        home.fetch(LOOSE)
        home.store.quarantine((LOOSE.id,), LOOSE.digests[0], "bad", 150.0)
    assert home.fs.list_dir(home.at.quarantine) == [f"{LOOSE.digests[0]}.{s}" for s in (150, 151)]


# --- claims, notes, use ---------------------------------------------------------------------


def test_claims_come_back(home: Home) -> None:
    first, second = pin("pin-1", A.ref), pin("pin-2", B.ref)
    for claim in (first, second, replace(second, fresh=True)):
        home.store.put_claim(claim)
    home.store.delete_claim(first.id)
    home.store.delete_claim(first.id)
    assert home.restart().claims == (replace(second, fresh=True),)


def test_a_claim_that_cannot_be_read_is_put_aside_and_told(home: Home) -> None:
    home.store.put_claim(pin("good", A.ref))
    home.fs.write_file(home.at.claims / "bad.json", b'{"id": "bad"')
    home.fs.write_file(home.at.claims / "alias.json", encode(pin("other", A.ref)))
    home.fs.write_file(home.at.claims / ".half.json.tmp", b"{")
    found = home.restart(now=300.0)
    assert [claim.id for claim in found.claims] == ["good"]
    assert len(found.problems) == 2 and "bad.json" in found.problems[1]
    assert home.fs.read_file(home.at.quarantine / "claim-bad.300" / "bad.json") == b'{"id": "bad"'
    assert home.fs.list_dir(home.at.claims) == ["good.json"]


def test_a_claims_name_stays_in_its_directory(home: Home) -> None:
    with pytest.raises(AssertionError):
        home.store.delete_claim(ClaimId("../VERSION"))


def test_use_is_noted(home: Home) -> None:
    home.fetch(A)
    home.store.touch(A.id, 555.0)
    home.store.touch(B.id, 555.0)
    assert home.restart().artifacts[0].last_used_at == 555.0


def test_notes_follow_their_artifacts(home: Home) -> None:
    home.fetch(A)
    home.fetch(B)
    other = Ref("http://origin/other/")
    home.store.put_note(Note(other, RevisionKey("12" * 32), A.id, True, 140.0))
    home.fs.unlink(home.at.note(B.ref))
    home.fs.write_file(home.at.note(A.ref), b"")
    notes = {note.ref: note for note in home.restart().notes}
    assert notes[other].resolved_at == 140.0
    assert notes[B.ref] == Note(B.ref, B.revision.key, B.id, True, 0.0)
    assert notes[A.ref].artifact == A.id
    home.store.evict(A.id, ())
    assert {note.ref for note in home.restart().notes} == {B.ref}


def test_the_newest_artifact_of_a_ref_gets_its_lost_note(home: Home) -> None:
    newer = SmallModel("a", {"model.bin": b"newer weights"})
    home.fetch(newer, now=200.0)
    home.fetch(A, now=100.0)
    home.fs.unlink(home.at.note(A.ref))
    assert [note.artifact for note in home.restart().notes] == [newer.id]


# --- what a scan mends ----------------------------------------------------------------------


def test_a_tree_that_is_gone_or_wrong_is_built_again(home: Home) -> None:
    home.fetch(A)
    home.fetch(B)
    tree = home.store.tree_path(A.id)
    home.fs.chmod(tree, 0o755)
    home.fs.unlink(tree / "config.json")
    home.fs.make_dir(home.at.trees / f".new-{'0' * 64}" / "half")
    home.fs.make_dir(home.at.trees / ("1" * 64))
    tree_b = home.store.tree_path(B.id)
    home.fs.chmod(tree_b, 0o755)
    home.fs.rename(tree_b, home.at.trees / ("2" * 64))
    home.restart()
    assert home.tree(A) == files_of(A) and home.tree(B) == files_of(B)
    assert len(home.fs.list_dir(home.at.trees)) == 2


@pytest.mark.parametrize("instead", [b"", b"cut", b"longer than it ever was, by a lot"])
def test_a_blob_of_the_wrong_size_takes_its_artifacts_down(home: Home, instead: bytes) -> None:
    home.fetch(A)
    home.fetch(B)
    home.damage(A.contents[1], instead)
    found = home.restart(now=300.0)
    assert ids(found) == {B.id} and home.tree(A) is None
    (down,) = found.quarantined
    assert (down.artifact, down.ref) == (A.id, A.ref)
    assert f"{len(instead)} bytes where {len(A.contents[1])}" in down.reason
    assert home.fs.read_file(home.at.quarantine / f"{sha256(A.contents[1])}.300" / "blob") == instead
    assert [ingest.revision for ingest in found.ingests] == [A.revision]
    assert [b is None for b in home.store.begin_fetch(A.revision, 310.0).have] == [False, True, False]


def test_a_missing_blob_takes_its_artifacts_down(home: Home) -> None:
    home.fetch(A)
    home.fetch(B)
    home.fs.unlink(home.at.blob(sha256(SHARED)))
    home.fs.unlink(home.at.blob(sha256(A.contents[1])))
    found = home.restart()
    assert found.artifacts == () and home.fs.list_dir(home.at.trees) == []
    assert {(down.artifact, down.ref) for down in found.quarantined} == {(A.id, A.ref), (B.id, B.ref)}
    assert home.fs.list_dir(home.at.quarantine) == []
    for model in (A, B):
        home.fetch(model)
        assert home.tree(model) == files_of(model)


@pytest.mark.parametrize("how", ["torn", "other id", "other file", "climbs"])
def test_a_manifest_that_is_wrong_is_put_aside(home: Home, how: str) -> None:
    home.fetch(A)
    path = home.at.manifest(A.id)
    first, *rest = A.manifest.files
    bad = {
        "torn": encode(A.manifest)[:-20],
        "other id": encode(replace(A.manifest, id=B.id)),
        "other file": encode(replace(A.manifest, files=(replace(first, path="another"), *rest))),
        "climbs": b"",
    }[how]
    if how == "climbs":
        evil = SmallModel("evil", {"../../VERSION": b"climbed"})
        path = home.at.manifest(evil.id)
        bad = encode(evil.manifest)
    home.fs.write_file(path, bad)
    found = home.restart(now=300.0)
    assert [down.artifact for down in found.quarantined] == [f"sha256:{path.stem}"]
    assert home.fs.read_file(home.at.quarantine / f"manifest-{path.stem}.300" / path.name) == bad
    assert home.fs.read_file(home.root / "VERSION") == b"1\n"
    if how != "climbs":
        assert found.artifacts == () and home.blobs() == set() and found.quarantined[0].ref == A.ref


def test_what_is_unneeded_goes_and_what_is_not_ours_stays(home: Home) -> None:
    home.fetch(A)
    stray = home.at.blob(sha256(b"stray"))
    home.fs.write_file(stray, b"stray")
    strangers = [
        home.at.blobs / "ab" / "notes.txt",
        home.at.artifacts / "README",
        home.at.trees / "mine",
        home.at.ingest / "mine",
    ]
    for path in strangers:
        home.fs.write_file(path, b"hello")
    home.fs.write_file(home.at.artifacts / f".{'0' * 64}.json.tmp", b"")
    home.fs.make_dir(home.at.ingest / ("3" * 64))
    found = home.restart()
    assert home.fs.size_bytes(stray) is None and ids(found) == {A.id}
    assert home.fs.list_dir(home.at.ingest) == ["mine"]
    assert all(home.fs.read_file(path) == b"hello" for path in strangers)
    assert all(any(str(path) in problem for problem in found.problems) for path in strangers)


def test_an_interrupted_quarantine_is_finished(home: Home) -> None:
    home.fetch(A)
    digest = sha256(A.contents[1])
    pending = home.at.quarantine / f".pending-{digest}.140"
    home.fs.make_dir(pending)
    home.fs.write_file(pending / "reason.json", encode(Intent(digest, "bad", 140.0, (A.id,))))
    home.fs.make_dir(home.at.quarantine / ".pending-torn.140")
    found = home.restart()
    assert found.artifacts == () and found.quarantined[0].reason == "bad"
    assert found.quarantined[0].ref == A.ref
    assert home.fs.list_dir(home.at.quarantine) == [f"{digest}.140"]
    assert home.fs.files_under(home.at.quarantine).keys() == {
        f"{digest}.140/blob",
        f"{digest}.140/reason.json",
    }


# --- real directories only ------------------------------------------------------------------


def test_trees_are_hard_links_that_cannot_be_changed_by_others(tmp_path: Path) -> None:
    home = Home(RealFs(), tmp_path / "data")
    home.fetch(A)
    tree = home.store.tree_path(A.id)
    for path in (tree, tree / "deep", tree / "deep" / "er"):
        assert path.stat().st_mode & 0o777 == 0o555
    linked = tree / "deep" / "er" / "model.bin"
    assert linked.samefile(home.at.blob(sha256(A.contents[1])))
    assert linked.stat().st_mode & 0o777 == 0o444
    assert (home.root / "claims").stat().st_mode & 0o777 == 0o700


def test_a_transfer_that_is_being_written_is_not_discarded(tmp_path: Path) -> None:
    home = Home(RealFs(), tmp_path / "data")
    plan = home.store.begin_fetch(A.revision, 100.0)
    with Partial.open(plan.directory / "0.part", plan.directory / "0.journal", 2) as part:
        with pytest.raises(CachedError) as caught:
            home.store.discard(A.revision.key, ())
        assert caught.value.problem.reason == "INGEST_BUSY" and caught.value.problem.temporary
        (plan.directory / "revision.json").unlink()
        assert "has no readable revision" in home.restart().problems[0]
        part.write_at(memoryview(A.contents[0]), 0)
        part.seal()
    home.store.discard(A.revision.key, ())
    assert os.listdir(home.root / "ingest") == []


def test_what_a_real_worker_delivers_is_committed(tmp_path: Path) -> None:
    home = Home(RealFs(), tmp_path / "data")
    plan = home.store.begin_fetch(LOOSE.revision, 100.0)
    content = LOOSE.contents[0]
    blob = blob_of(content)
    with Partial.open(plan.directory / "0.part", plan.directory / "0.journal", len(content)) as part:
        part.write_at(memoryview(content), 0)
        part.record(f"0 {blob.chunks[0]}")
        part.record(f"done {blob.sha256}")
        part.seal()
    home.store.commit_blob(LOOSE.revision.key, 0, blob)
    home.store.commit_artifact(LOOSE.manifest, LOOSE.revision, 110.0)
    assert home.tree(LOOSE) == files_of(LOOSE)


def test_the_room_is_the_file_systems_and_tells_what_is_ours(home: Home) -> None:
    home.fetch(A)
    a_bytes = sum(map(len, A.contents))
    room = home.store.room()
    assert 0 < room.free_bytes < room.total_bytes and room.own_bytes == a_bytes
    home.fetch(B)
    plan = home.store.begin_fetch(LOOSE.revision, 120.0)
    deliver(home.fs, plan.directory, 0, LOOSE.contents[0])
    beside = home.fs.allocated_bytes(home.at.ingest)
    assert beside >= len(LOOSE.contents[0])
    assert home.store.room().own_bytes == a_bytes + len(b"weights of b") + beside
    home.restart()
    assert home.store.room().own_bytes == a_bytes + len(b"weights of b") + beside
    home.store.discard(LOOSE.revision.key, ())
    home.store.evict(A.id, (sha256(b"{}"), sha256(b"weights of a")))
    assert home.store.room().own_bytes == len(b"weights of b") + len(SHARED)
    home.store.quarantine((B.id,), sha256(SHARED), "bad", 150.0)
    away = home.fs.allocated_bytes(home.at.quarantine) + home.fs.allocated_bytes(home.at.ingest)
    assert home.store.room().own_bytes == len(b"weights of b") + away


def test_a_thousand_artifacts_are_found_in_well_under_a_second(tmp_path: Path) -> None:
    home = Home(RealFs(), tmp_path / "data")
    for number in range(1000):
        model = SmallModel(f"m{number}", {"model.bin": b"%d" % number, "tokenizer": SHARED})
        manifest = model.manifest
        for content in model.contents:
            home.at.blob(sha256(content)).write_bytes(content)
        home.at.manifest(model.id).write_bytes(encode(manifest))
        tree = home.at.tree(model.id)
        tree.mkdir()
        for file in manifest.files:
            os.link(home.at.blob(file.blob.sha256), tree / file.path)
        home.at.note(model.ref).write_bytes(encode(Note(model.ref, manifest.revision, model.id, True, 1.0)))
    began = time.monotonic()
    found = home.restart()
    took_s = time.monotonic() - began
    assert len(found.artifacts) == 1000 and found.problems == ()
    assert took_s < 1.0, took_s


# --- journals -------------------------------------------------------------------------------


def test_a_journal_is_read_back_as_it_was_written() -> None:
    blob = Blob(sha256(b"x"), 2 * CHUNK_BYTES + 1, ("0" * 32, "1" * 32, "2" * 32))
    journal = parse_journal(format_journal(blob))
    assert journal.blob(blob.size_bytes) == blob
    assert journal.blob(3 * CHUNK_BYTES + 1) is None


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", Journal({}, None)),
        (b"0 " + b"a" * 32, Journal({}, None)),
        (b"0 " + b"a" * 32 + b"\n0 " + b"b" * 32 + b"\n", Journal({0: "b" * 32}, None)),
        (b"\xff\xfe\n-1 " + b"a" * 32 + b"\n9999999 " + b"a" * 32 + b"\ndone abc\n", Journal({}, None)),
        (b"done " + b"a" * 64 + b"\n", Journal({}, Digest("a" * 64))),
    ],
)
def test_a_journals_rubbish_is_passed_over(data: bytes, expected: Journal) -> None:
    assert parse_journal(data) == expected
