"""Refs as people write them, which files are taken, secrets by reference, and the choice of a source."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from cached.config import SourceSettings
from cached.model import (
    CachedError,
    Digest,
    ErrorKind,
    FileSpec,
    Problem,
    Ref,
    Revision,
    parse_ref,
    revision_key,
)
from cached.sources import Origins
from cached.sources.filters import check_attested, select
from cached.sources.secrets import options_of, token_of

HEX = "ab" * 32
REF = Ref("hf://org/name")


def refused(caught: pytest.ExceptionInfo[CachedError]) -> Problem:
    assert caught.value.problem.hint
    return caught.value.problem


# --- refs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("file:///dir", "file:///dir/"),
        ("https://host/dir", "https://host/dir/"),
        ("https://host", "https://host/"),
        (f"https://host/m/a.gguf#sha256={HEX.upper()}", f"https://host/m/a.gguf#sha256={HEX}"),
        ("hf://org/name", "hf://org/name"),
        ("hf://org/name/", "hf://org/name"),
        ("hf://org/na.me_1-x@main", "hf://org/na.me_1-x@main"),
        ("hf://org/name@refs/pr/1", "hf://org/name@refs/pr/1"),
        ("oci://ghcr.io/org/name", "oci://ghcr.io/org/name:latest"),
        ("oci://registry:5000/a/b__c/d-e/", "oci://registry:5000/a/b__c/d-e:latest"),
        ("oci://[::1]:5000/a:V1.0-rc_1", "oci://[::1]:5000/a:V1.0-rc_1"),
        (f"oci://h/a@sha256:{HEX}", f"oci://h/a@sha256:{HEX}"),
        (f"oci://h:1/a:t@sha256:{HEX}", f"oci://h:1/a:t@sha256:{HEX}"),
        ("s3://bucket/a/b", "s3://bucket/a/b/"),
        ("s3://bucket", "s3://bucket/"),
        ("memory:///dir", "memory:///dir/"),
        ("ssh://user@host/dir", "ssh://user@host/dir/"),
        ("gs://bucket/x", "gs://bucket/x/"),
    ],
)
def test_a_ref_has_one_way_to_be_written(text: str, ref: str) -> None:
    assert parse_ref(text) == ref
    assert parse_ref(ref) == ref


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "1 to 2048"),
        ("name", "scheme"),
        ("HTTP://host/", "scheme"),
        ("zip::https://host/x.zip", "scheme"),
        ("hf://name", "hf://org/name"),
        ("hf://datasets/org/name", "hf://org/name"),
        ("hf://org/name@", "hf://org/name"),
        ("hf://org/name@a/../b", "behind the @"),
        ("hf://org/../x", "hf://org/name"),
        ("hf://org/name?x=1", "hf://org/name"),
        ("oci://registry", "oci://registry/repo"),
        ("oci://registry/Team/x", "lower case"),
        ("oci://Registry/x", "lower case"),
        ("oci://registry/a//b", "oci://registry/repo"),
        ("oci://registry/../b", "oci://registry/repo"),
        ("oci://registry/a:" + "t" * 129, "oci://registry/repo"),
        ("oci://registry/a:.t", "oci://registry/repo"),
        ("oci://registry:70000/a", "oci://registry/repo"),
        ("oci://registry/a@sha256:00", "oci://registry/repo"),
        (f"oci://registry/a@sha512:{HEX}", "oci://registry/repo"),
        ("oci://registry/a?b", "oci://registry/repo"),
        ("oci://me@registry/a", "oci://registry/repo"),
        ("oci://registry/" + "a" * 255, "oci://registry/repo"),
        ("s3:///key", "no directory"),
        ("https:///dir", "no directory"),
        ("file://host/dir", "no directory"),
        ("memory://", "no directory"),
        ("https://host/dir?x=1", "query"),
        ("https://host/../x", "climbs"),
        ("s3://bucket/a/../b", "climbs"),
        ("https://host/file#sha1=00", "64 hex digits"),
        (f"https://host/file#sha256={HEX[:-1]}", "64 hex digits"),
        (f"https://host/dir/#sha256={HEX}", "directory's"),
        (f"https://host#sha256={HEX}", "directory's"),
        (f"file:///file#sha256={HEX}", "fragment"),
        ("https://host/dir#", "64 hex digits"),
    ],
)
def test_what_is_no_ref_is_refused_with_the_reason(text: str, said: str) -> None:
    with pytest.raises(CachedError) as caught:
        parse_ref(text)
    problem = refused(caught)
    assert (problem.kind, problem.reason) == (ErrorKind.INVALID, "BAD_REF")
    assert said in problem.message


@pytest.mark.parametrize(
    "text", ["https://me:hunter2@host/dir/", "ftp://me:hunter2@host/dir/", "oci://me:hunter2@h/a"]
)
def test_a_password_in_a_ref_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(CachedError) as caught:
        parse_ref(text)
    problem = refused(caught)
    assert "password" in problem.message and "hunter2" not in problem.message + problem.hint


# --- which files ----------------------------------------------------------------------------


def settings(**fields: object) -> SourceSettings:
    return SourceSettings("hf://org", **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "chosen"),
    [
        ({}, "LICENSE a.safetensors sub/b.safetensors sub/notes.md"),
        ({"include": ("*.safetensors",)}, "a.safetensors sub/b.safetensors"),
        ({"include": ("sub/",)}, "sub/b.safetensors sub/notes.md"),
        ({"include": ("sub/*.md", "LICENSE")}, "LICENSE sub/notes.md"),
        ({"exclude": ("sub/",)}, "LICENSE a.safetensors"),
        ({"include": ("*.safetensors",), "exclude": ("a.*",)}, "sub/b.safetensors"),
        ({"allow_pickle": True}, "LICENSE a.bin a.safetensors old.PT sub/b.safetensors sub/notes.md"),
    ],
)
def test_globs_and_pickles(fields: dict[str, object], chosen: str) -> None:
    listed = ["LICENSE", "a.bin", "a.safetensors", "old.PT", "sub/b.safetensors", "sub/notes.md"]
    assert " ".join(sorted(select(listed, settings(**fields), REF))) == chosen


@pytest.mark.parametrize("name", ["pytorch_model.bin", "x.pt", "x.pth", "x.ckpt", "x.pkl", "sub/X.BIN"])
def test_nothing_but_pickles_is_refused_by_name_unless_allowed(name: str) -> None:
    with pytest.raises(CachedError) as caught:
        select(["config.json", name], settings(), REF)
    problem = refused(caught)
    assert (problem.kind, problem.reason) == (ErrorKind.DENIED, "ONLY_PICKLE")
    assert name in problem.message and "allow_pickle" in problem.hint
    assert name in select(["config.json", name], settings(allow_pickle=True), REF)


def test_globs_that_leave_nothing_are_refused() -> None:
    with pytest.raises(CachedError) as caught:
        select(["a"], settings(include=("b",)), REF)
    assert refused(caught).reason == "NO_FILES"
    assert select([], settings(include=("b",)), REF) == frozenset()


def revision(*files: FileSpec) -> Revision:
    return Revision(REF, revision_key(REF, files), files)


def test_a_required_digest_that_is_missing_is_refused_by_name() -> None:
    vouched = FileSpec("a", 1, Digest(HEX))
    by_git = FileSpec("b", 1, None, checksum="git:" + "0" * 40)
    bare, otherwise = FileSpec("c", 1, None), FileSpec("d", 1, None, checksum="crc64nvme:00")
    strict = settings(require_digest=True)
    check_attested(revision(vouched, by_git), strict)
    check_attested(revision(bare), settings())
    with pytest.raises(CachedError) as caught:
        check_attested(revision(vouched, bare, otherwise), strict)
    problem = refused(caught)
    assert (problem.kind, problem.reason) == (ErrorKind.DENIED, "NOT_ATTESTED")
    assert "digest of c and 1 more" in problem.message
    assert revision(vouched, by_git).attested and not revision(vouched, otherwise).attested


def test_a_required_digest_holds_for_whatever_is_resolved(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    ref = parse_ref(f"file://{tmp_path}")
    origins = Origins(1, 1.0, {})
    assert not origins.resolve(ref).attested
    with pytest.raises(CachedError, match="publishes no digest of a"):
        origins.resolve(ref, SourceSettings("file://", require_digest=True))


def test_a_checksum_is_in_the_key_and_its_absence_is_not() -> None:
    bare, checked = FileSpec("a", 1, None, "v"), FileSpec("a", 1, None, "v", "git:" + "0" * 40)
    assert revision(bare).key != revision(checked).key
    # As keys on disk were made before there were checksums.
    body = json.dumps([REF, ["a", "1", "", "v"]])
    assert revision(bare).key == hashlib.sha256(body.encode()).hexdigest()


# --- secrets --------------------------------------------------------------------------------


def test_secrets_are_read_from_where_they_are_said_to_stand(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("from-file\n")
    env = {"T": "from-env", "EMPTY": ""}
    assert token_of(settings(token_env="T"), env) == "from-env"
    assert token_of(settings(token_file=str(tmp_path / "t")), env) == "from-file"
    assert token_of(settings(), env) is None
    options = {"key": "env:T", "secret": f"file:{tmp_path}/t", "endpoint": "http://h", "url": "file:///x"}
    found = options_of(settings(options=options), env)
    assert found == {"key": "from-env", "secret": "from-file", "endpoint": "http://h", "url": "file:///x"}


def test_a_secret_that_is_not_there_is_named_by_its_place(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "two").write_text("one\ntwo")
    for fields in (
        {"token_env": "T"},
        {"token_file": str(tmp_path / "gone")},
        {"token_file": str(tmp_path / "empty")},
        {"token_file": str(tmp_path / "two")},
    ):
        with pytest.raises(CachedError) as caught:
            token_of(settings(**fields), {})
        problem = refused(caught)
        assert (problem.kind, problem.reason) == (ErrorKind.PRECONDITION, "NO_SECRET")
        assert "hf://org" in problem.message and next(iter(fields)) in problem.message
        assert "two" not in problem.message.replace(str(tmp_path / "two"), "")


# --- the choice of a source -----------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["nonsense", "local", "simplecache", "zip"])
def test_a_scheme_that_leads_nowhere_is_refused_with_those_that_do(scheme: str) -> None:
    with pytest.raises(CachedError) as caught:
        Origins(1, 1.0, {}).source_for(parse_ref(f"{scheme}://x/y"))
    problem = refused(caught)
    assert (problem.kind, problem.reason) == (ErrorKind.INVALID, "UNKNOWN_SCHEME")
    assert repr(scheme) in problem.message
    known = problem.hint.removeprefix("known are ").split(", ")
    assert {"file", "hf", "http", "https", "oci", "s3", "gs", "sftp"} <= set(known) and scheme not in known


def test_one_source_serves_all_refs_of_the_same_settings() -> None:
    origins = Origins(1, 1.0, {})
    one, two = Ref("http://h/a/"), Ref("http://h/b/")
    corp = SourceSettings("http://h", require_digest=True)
    assert origins.source_for(one) is origins.source_for(two, SourceSettings(two))
    assert origins.source_for(one, corp) is origins.source_for(two, corp)
    assert origins.source_for(one) is not origins.source_for(one, corp)
    before = origins.source_for(one, corp)
    assert origins.source_for(one, SourceSettings("http://h", anonymous=True)) is not before
    origins.close()
