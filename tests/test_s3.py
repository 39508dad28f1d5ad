"""S3 as an origin: against moto, rclone and s3rver, which are real, and one that says what it is told to."""

from __future__ import annotations

import base64
import functools
import hashlib
import os
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from httpkit import make_authority
from s3kit import (
    CREDENTIALS,
    KEY,
    S3RVER_CREDENTIALS,
    Answer,
    Script,
    Store,
    environment,
    moto,
    rclone_s3,
    refusal,
    s3rver,
    scripted,
)

from cached.config import SourceSettings, TransferSettings
from cached.fetch import FetchJob, FetchPool
from cached.fetch.checksums import begin
from cached.model import MAX_FILES, Blob, CachedError, ErrorKind, FileSpec, Problem, Ref, parse_ref
from cached.sources import Origins, RangesIgnoredError
from cached.sources.s3 import S3Source

REF = parse_ref("s3://models/m/")
DATA = bytes(range(256)) * 20


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sums_of(files: dict[str, bytes]) -> bytes:
    return "".join(f"{sha256(data)}  {name}\n" for name, data in files.items()).encode()


def source_at(url: str | None, **settings: Any) -> S3Source:
    return S3Source(SourceSettings("s3://", endpoint=url, **{"addressing": "path", **settings}), 4, 2.0)


@functools.cache
def shared_source(url: str) -> S3Source:
    """Made once, as a client takes a quarter of a second to make."""
    return source_at(url)


def problem_in(caught: pytest.ExceptionInfo[CachedError]) -> Problem:
    """The problem, which must say what to do."""
    assert caught.value.problem.hint
    return caught.value.problem


def refused(source: S3Source, ref: Ref = REF) -> Problem:
    with pytest.raises(CachedError) as caught:
        source.resolve(ref)
    return problem_in(caught)


def read_range(source: S3Source, spec: FileSpec, start: int, stop: int, ref: Ref = REF) -> bytes:
    reader = source.open(ref, spec)
    view = memoryview(bytearray(1000))
    try:
        return b"".join(bytes(view[:count]) for count in reader.read(start, stop, lambda: view))
    finally:
        reader.close()


def read_refused(source: S3Source, spec: FileSpec, start: int, stop: int) -> Problem:
    with pytest.raises(CachedError) as caught:
        read_range(source, spec, start, stop)
    return problem_in(caught)


@pytest.fixture(scope="module")
def server() -> Iterator[Store]:
    with moto() as found:
        yield found


@pytest.fixture(autouse=True)
def credentials() -> Iterator[None]:
    with environment(**CREDENTIALS):
        yield


@pytest.fixture
def store(server: Store) -> Iterator[Store]:
    """An empty bucket ``models``, and nothing else."""
    for bucket in server.client.list_buckets()["Buckets"]:
        name = bucket["Name"]
        for found in server.client.list_object_versions(Bucket=name).get("Versions", ()):
            server.client.delete_object(Bucket=name, Key=found["Key"], VersionId=found["VersionId"])
        server.client.delete_bucket(Bucket=name)
    server.client.create_bucket(Bucket="models")
    yield server


@pytest.fixture
def source(store: Store) -> S3Source:
    return shared_source(store.url)


@pytest.fixture(scope="module")
def liar() -> Iterator[Script]:
    with scripted() as found:
        yield found


@pytest.fixture
def script(liar: Script) -> Script:
    """A server that says what it is told to, and has said nothing yet."""
    liar.answers.clear()
    liar.asked.clear()
    liar.ports.clear()
    return liar


# --- listings -------------------------------------------------------------------------------


def test_a_prefix_is_listed_with_sizes_and_etags(store: Store, source: S3Source) -> None:
    store.put("models", {"m/a": DATA, "m/sub/ü +%#?": b"u", "m/empty": b"", "m/sub/": b""})
    store.put("models", {"m2/other": b"x", "top": b"x"})
    revision = source.resolve(REF)
    assert [(f.path, f.size_bytes, f.sha256) for f in revision.files] == [
        ("a", 5120, None),
        ("empty", 0, None),
        ("sub/ü +%#?", 1, None),
    ]
    assert not revision.attested
    assert revision.files[0].version == f'"{hashlib.md5(DATA).hexdigest()}"'
    assert source.resolve(REF) == revision
    assert read_range(source, revision.files[2], 0, 1) == b"u"


def test_a_whole_bucket_is_a_model_too(store: Store, source: S3Source) -> None:
    store.put("models", {"a": b"a", "sub/b": b"b"})
    assert [f.path for f in source.resolve(parse_ref("s3://models")).files] == ["a", "sub/b"]


def test_the_key_changes_when_an_object_does(store: Store, source: S3Source) -> None:
    store.put("models", {"m/a": b"a"})
    before = source.resolve(REF)
    store.put("models", {"m/a": b"b"})
    assert source.resolve(REF).key != before.key


def test_the_sha256_of_a_whole_object_attests_it(store: Store, source: S3Source) -> None:
    store.client.put_object(Bucket="models", Key="m/a", Body=DATA, ChecksumAlgorithm="SHA256")
    revision = source.resolve(REF)
    assert revision.files[0].sha256 == sha256(DATA)
    assert revision.attested


@pytest.mark.parametrize("kind", ["CRC32", "CRC32C", "CRC64NVME"])
def test_a_crc_is_checked_and_attests_nothing(store: Store, source: S3Source, kind: Any) -> None:
    store.client.put_object(Bucket="models", Key="m/a", Body=DATA, ChecksumAlgorithm=kind)
    revision = source.resolve(REF)
    spec = revision.files[0]
    assert spec.sha256 is None and not revision.attested
    assert spec.checksum.startswith(kind.lower() + ":")
    checksum = begin(spec)
    assert checksum is not None
    checksum.update(memoryview(DATA)[:1000])
    before = checksum.copy()
    checksum.update(memoryview(DATA)[1000:])
    assert f"{kind.lower()}:{checksum.hexdigest()}" == spec.checksum
    assert before.hexdigest() != checksum.hexdigest()


def test_a_digest_of_parts_is_not_taken_for_the_contents(store: Store, source: S3Source) -> None:
    at: Any = {"Bucket": "models", "Key": "m/a"}
    upload = store.client.create_multipart_upload(**at, ChecksumAlgorithm="SHA256")["UploadId"]
    parts: list[Any] = []
    for number, body in ((1, bytes(5 << 20)), (2, b"rest")):
        done = store.client.upload_part(
            **at, UploadId=upload, PartNumber=number, Body=body, ChecksumAlgorithm="SHA256"
        )
        parts.append({"PartNumber": number, "ETag": done["ETag"], "ChecksumSHA256": done["ChecksumSHA256"]})
    store.client.complete_multipart_upload(**at, UploadId=upload, MultipartUpload={"Parts": parts})
    head = store.client.head_object(**at, ChecksumMode="ENABLED")
    assert head["ChecksumSHA256"] and head["ETag"].endswith('-2"')
    spec = source.resolve(REF).files[0]
    assert (spec.sha256, spec.checksum) == (None, "")


@pytest.mark.parametrize(
    ("told", "kind", "attests"),
    [
        (base64.b64encode(bytes(32)).decode(), "FULL_OBJECT", True),
        (base64.b64encode(bytes(32)).decode(), "COMPOSITE", False),
        (base64.b64encode(bytes(32)).decode() + "-2", "COMPOSITE", False),
        (base64.b64encode(bytes(32)).decode() + "-2", None, False),
        (base64.b64encode(bytes(31)).decode(), "FULL_OBJECT", False),
        ("nonsense", "FULL_OBJECT", False),
    ],
)
def test_only_a_whole_objects_sha256_counts(
    script: Script, told: str, kind: str | None, attests: bool
) -> None:
    headers = [("ETag", '"e"'), ("x-amz-checksum-sha256", told)]
    headers += [("x-amz-checksum-type", kind)] if kind else []
    script.says(refusal(404, "NoSuchKey"), page(["m/a"]))
    script.says(Answer(200, b"aa", tuple(headers)), method="HEAD")
    spec = shared_source(script.url).resolve(REF).files[0]
    assert spec.sha256 == ("00" * 32 if attests else None)


def test_sums_are_honoured_first(store: Store, source: S3Source) -> None:
    files = {"a": DATA, "sub/b": b"b"}
    store.put("models", {f"m/{name}": data for name, data in files.items()})
    store.put("models", {"m/unlisted": b"x", "m/SHA256SUMS": sums_of(files)})
    revision = source.resolve(REF)
    assert [(f.path, f.sha256) for f in revision.files] == [(n, sha256(d)) for n, d in files.items()]
    assert revision.attested


def test_an_object_that_sums_list_and_is_not_there_is_named(store: Store, source: S3Source) -> None:
    store.put("models", {"m/SHA256SUMS": sums_of({"gone": b""})})
    problem = refused(source)
    assert (problem.kind, problem.reason) == (ErrorKind.NOT_FOUND, "MISSING_FILE")
    assert "s3://models/m/gone" in problem.message


@pytest.mark.parametrize("name", ["../x", "a//b", "a/../b", "x" * 600])
def test_an_unsafe_key_is_refused(store: Store, source: S3Source, name: str) -> None:
    store.put("models", {f"m/{name}": b"x"})
    assert refused(source).reason == "UNSAFE_PATH"


def test_what_is_not_there_is_told_apart(store: Store, source: S3Source) -> None:
    problem = refused(source)
    assert (problem.kind, problem.reason) == (ErrorKind.NOT_FOUND, "NO_FILES")
    problem = refused(source, parse_ref("s3://nobodys/m/"))
    assert (problem.kind, problem.reason) == (ErrorKind.NOT_FOUND, "NO_SUCH_BUCKET")
    assert "s3://nobodys/m/" in problem.message
    assert refused(source, parse_ref("s3://No!/m/")).reason == "BAD_REF"


def page(keys: list[str], then: str = "") -> Answer:
    contents = "".join(f"<Contents><Key>{key}</Key><Size>1</Size></Contents>" for key in keys)
    more = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{then}</NextContinuationToken>"
    return Answer(200, f"<ListBucketResult>{more if then else ''}{contents}</ListBucketResult>".encode())


def test_all_pages_are_read(script: Script) -> None:
    script.says(
        refusal(404, "NoSuchKey"), page(["m/a", "m/b"], then="one"), page([], then="two"), page(["m/c"])
    )
    script.says(Answer(200, b"x"), method="HEAD")
    assert [f.path for f in shared_source(script.url).resolve(REF).files] == ["a", "b", "c"]
    assert "continuation-token=two" in script.asked[3][1]


def test_a_listing_has_a_bound(script: Script) -> None:
    pages = [page([f"m/{p}.{n}" for n in range(1000)], then=str(p)) for p in range(MAX_FILES // 1000 + 1)]
    script.says(refusal(404, "NoSuchKey"), *pages, refusal(500, "InternalError"))
    problem = refused(shared_source(script.url))
    assert problem.reason == "TOO_MANY_FILES" and str(MAX_FILES) in problem.message


def test_a_listing_that_goes_in_a_circle_ends(script: Script) -> None:
    script.says(refusal(404, "NoSuchKey"), page(["m/a"], then="again"))
    assert refused(shared_source(script.url)).reason == "BAD_LISTING"


def test_a_listing_of_another_prefix_is_refused(script: Script) -> None:
    script.says(refusal(404, "NoSuchKey"), page(["m/a", "other/b"]))
    problem = refused(shared_source(script.url))
    assert problem.reason == "BAD_LISTING" and "other/b" in problem.message


def test_filters_and_required_digests_hold_here_too(store: Store) -> None:
    store.put("models", {"m/a.safetensors": b"a", "m/a.bin": b"p", "m/readme.md": b"r"})
    origins = Origins(2, 2.0)
    settings = SourceSettings("s3://models", endpoint=store.url, addressing="path", exclude=("*.md",))
    assert [f.path for f in origins.resolve(REF, settings).files] == ["a.safetensors"]
    with pytest.raises(CachedError) as caught:
        origins.resolve(
            REF, SourceSettings("s3://models", endpoint=store.url, addressing="path", require_digest=True)
        )
    assert problem_in(caught).reason == "NOT_ATTESTED"
    origins.close()


# --- bytes ----------------------------------------------------------------------------------


def test_ranges_come_in_pieces(store: Store, source: S3Source) -> None:
    store.put("models", {"m/a": DATA})
    spec = source.resolve(REF).files[0]
    assert read_range(source, spec, 0, 5120) == DATA
    assert read_range(source, spec, 1000, 3500) == DATA[1000:3500]
    view = memoryview(bytearray(100))
    for _ in range(10):
        reading = source.open(REF, spec).read(0, 5120, lambda: view)
        assert next(reading) == 100
        reading.close()
    assert read_range(source, spec, 5119, 5120) == DATA[-1:]


def test_a_version_is_read_as_it_was_listed(store: Store, source: S3Source) -> None:
    store.client.put_bucket_versioning(Bucket="models", VersioningConfiguration={"Status": "Enabled"})
    store.put("models", {"m/a": DATA})
    before = source.resolve(REF)
    store.put("models", {"m/a": b"new"})
    assert before.files[0].version.startswith("versionId=")
    assert source.resolve(REF).key != before.key
    assert read_range(source, before.files[0], 10, 2000) == DATA[10:2000]
    store.client.delete_object(
        Bucket="models", Key="m/a", VersionId=before.files[0].version.removeprefix("versionId=")
    )
    assert read_refused(source, before.files[0], 0, 10).reason == "MISSING_FILE"


def test_a_change_after_the_listing_is_noticed(store: Store, source: S3Source) -> None:
    store.put("models", {"m/a": DATA})
    spec = source.resolve(REF).files[0]
    store.put("models", {"m/a": DATA[::-1]})
    problem = read_refused(source, spec, 0, 100)
    assert problem.reason == "ORIGIN_CHANGED" and not problem.temporary
    store.client.delete_object(Bucket="models", Key="m/a")
    assert read_refused(source, spec, 0, 100).reason == "MISSING_FILE"


def answer(data: bytes, status: int = 206, said: str = "", etag: str = '"e"', cut: bool = False) -> Answer:
    headers = (("Content-Range", said),) if said else ()
    return Answer(status, data, (("ETag", etag), *headers), cut)


SPEC = FileSpec("a", 5120, None, '"e"')


def test_a_range_is_asked_of_the_listed_etag(script: Script) -> None:
    script.says(answer(DATA[:10], said="bytes 0-9/5120"))
    assert read_range(shared_source(script.url), SPEC, 0, 10) == DATA[:10]
    headers = script.asked[0][2]
    assert (headers["Range"], headers["If-Match"]) == ("bytes=0-9", '"e"')


def test_a_weak_etag_is_compared_and_not_asked_for(script: Script) -> None:
    script.says(answer(DATA[:10], said="bytes 0-9/5120", etag='W/"e"'))
    weak = replace(SPEC, version='W/"e"')
    assert read_range(shared_source(script.url), weak, 0, 10) == DATA[:10]
    assert "If-Match" not in script.asked[0][2]
    script.says(answer(DATA[:10], said="bytes 0-9/5120", etag='W/"other"'))
    assert read_refused(shared_source(script.url), weak, 0, 10).reason == "ORIGIN_CHANGED"


def test_a_range_that_comes_with_200_is_a_range(script: Script) -> None:
    script.says(answer(DATA[5:10], 200, "bytes 5-9/5120"))
    assert read_range(shared_source(script.url), SPEC, 5, 10) == DATA[5:10]


def test_a_server_without_ranges_is_told(script: Script) -> None:
    script.says(answer(DATA, 200))
    source = shared_source(script.url)
    with pytest.raises(RangesIgnoredError):
        read_range(source, SPEC, 5, 10)
    assert read_range(source, SPEC, 0, 5120) == DATA


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (answer(DATA[:10], said="bytes 1-10/5120"), "BAD_RANGE"),
        (answer(DATA[:11], said="bytes 0-9/5120"), "BAD_RANGE"),
        (answer(DATA[:10], said="nonsense"), "BAD_RANGE"),
        (answer(DATA[:10], said="bytes 0-9/6000"), "SIZE_MISMATCH"),
        (answer(DATA[:100], 200), "SIZE_MISMATCH"),
        (refusal(416, "InvalidRange"), "SIZE_MISMATCH"),
        (answer(DATA[:10], said="bytes 0-9/5120", etag='"other"'), "ORIGIN_CHANGED"),
        (refusal(412, "PreconditionFailed"), "ORIGIN_CHANGED"),
        (refusal(404, "NoSuchVersion"), "MISSING_FILE"),
    ],
)
def test_answers_that_are_wrong_are_refused(script: Script, said: Answer, reason: str) -> None:
    script.says(said)
    problem = read_refused(shared_source(script.url), SPEC, 0, 10)
    assert problem.reason == reason and not problem.temporary
    assert "s3://models/m/a" in problem.message


def test_an_answer_that_is_cut_is_temporary(script: Script) -> None:
    script.says(Answer(206, DATA[:4], (("Content-Range", "bytes 0-9/5120"), ("Content-Length", "10")), True))
    problem = read_refused(shared_source(script.url), SPEC, 0, 10)
    assert problem.temporary and problem.reason == "ORIGIN_BROKE_OFF"


def test_connections_are_kept(script: Script) -> None:
    script.says(answer(DATA[:2000], said="bytes 0-1999/5120"))
    source = shared_source(script.url)
    for _ in range(5):
        read_range(source, SPEC, 0, 2000)
    assert len(script.asked) == 5 and len(script.ports) == 1


@pytest.mark.parametrize("right", [True, False])
async def test_a_fetch_checks_the_crc(script: Script, tmp_path: Path, right: bool) -> None:
    crc = zlib.crc32(DATA).to_bytes(4, "big")
    headers = (("ETag", '"e"'), ("x-amz-checksum-crc32", base64.b64encode(crc).decode()))
    served = DATA if right else DATA[:-1] + b"?"
    script.says(refusal(404, "NoSuchKey"), page(["m/a"]), answer(served, 200))
    script.says(Answer(200, DATA, headers), method="HEAD")
    settings = TransferSettings(workers=1, connections=1, attempts=1, timeout_s=2.0)
    sources = (SourceSettings("s3://", endpoint=script.url, addressing="path"),)
    pool = FetchPool(settings, sources=sources)

    async def sealed(index: int, blob: Blob) -> None:
        assert (index, blob.sha256) == (0, sha256(DATA))

    try:
        revision = await pool.resolve(REF)
        job = FetchJob(revision, str(tmp_path), (None,), False)
        if right:
            assert not (await pool.fetch(job, lambda done, received: None, sealed)).attested
            return
        with pytest.raises(CachedError) as caught:
            await pool.fetch(job, lambda done, received: None, sealed)
        problem = problem_in(caught)
        assert (problem.kind, problem.reason) == (ErrorKind.DATA_LOSS, "DIGEST_MISMATCH")
        assert f"crc32:{crc.hex()}" in problem.message
    finally:
        await pool.close()


# --- credentials ----------------------------------------------------------------------------


def test_without_credentials_it_says_what_was_tried(script: Script) -> None:
    with environment():
        problem = refused(source_at(script.url))
    assert (problem.kind, problem.reason) == (ErrorKind.DENIED, "NO_CREDENTIALS")
    for tried in ("env", "shared-credentials-file", "container-role", "iam-role"):
        assert tried in problem.message
    assert script.asked == []


def test_an_anonymous_source_signs_nothing(script: Script) -> None:
    script.says(refusal(404, "NoSuchKey"), page(["m/a"]))
    script.says(Answer(200, b"x"), method="HEAD")
    source_at(script.url, anonymous=True).resolve(REF)
    assert len(script.asked) == 3
    assert not any("Authorization" in headers for _, _, headers in script.asked)
    script.says(refusal(403, "AccessDenied"))
    assert "unsigned" in refused(source_at(script.url, anonymous=True)).message


def test_a_profile_is_used(script: Script, tmp_path: Path) -> None:
    (tmp_path / "credentials").write_text(
        "[weights]\naws_access_key_id = PROFILEKEY\naws_secret_access_key = s\n"
    )
    script.says(refusal(403, "AccessDenied"))
    with environment(AWS_SHARED_CREDENTIALS_FILE=str(tmp_path / "credentials")):
        problem = refused(source_at(script.url, profile="weights", region="eu-north-7"))
        assert (problem.kind, problem.reason) == (ErrorKind.DENIED, "ORIGIN_DENIED")
        assert "shared-credentials-file" in problem.message
        authorization = script.asked[0][2]["Authorization"]
        assert "PROFILEKEY" in authorization and "/eu-north-7/s3/" in authorization
        problem = refused(source_at(script.url, profile="other"))
        assert problem.reason == "NO_CREDENTIALS" and "other" in problem.message


def test_half_of_the_credentials_is_told(script: Script) -> None:
    with environment(AWS_ACCESS_KEY_ID=KEY):
        problem = refused(source_at(script.url))
    assert problem.reason == "NO_CREDENTIALS" and "env" in problem.message


def test_credentials_that_a_program_does_not_give(script: Script, tmp_path: Path) -> None:
    (tmp_path / "config").write_text("[default]\ncredential_process = /bin/false\n")
    with environment(AWS_CONFIG_FILE=str(tmp_path / "config")):
        problem = refused(source_at(script.url))
    assert (problem.kind, problem.reason) == (ErrorKind.DENIED, "CREDENTIALS_EXPIRED")


def test_credentials_that_are_rotated_midway_are_found(script: Script, tmp_path: Path) -> None:
    file = tmp_path / "credentials"

    def rotate(key: str) -> None:
        file.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = s\n")

    script.says(refusal(400, "ExpiredToken"))
    rotate("OLDKEY")
    with environment(AWS_SHARED_CREDENTIALS_FILE=str(file)):
        source = source_at(script.url)
        problem = refused(source)
        assert (problem.kind, problem.reason) == (ErrorKind.DENIED, "CREDENTIALS_EXPIRED")
        rotate("NEWKEY")
        problem = refused(source)
        assert problem.temporary and problem.reason == "CREDENTIALS_RENEWED"
        refused(source)
    assert [key in script.asked[-1][2]["Authorization"] for key in ("OLDKEY", "NEWKEY")] == [False, True]


# --- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "kind", "reason"),
    [
        (refusal(403, "AccessDenied"), ErrorKind.DENIED, "ORIGIN_DENIED"),
        (Answer(403), ErrorKind.DENIED, "ORIGIN_DENIED"),
        (refusal(403, "InvalidAccessKeyId"), ErrorKind.DENIED, "BAD_CREDENTIALS"),
        (refusal(403, "SignatureDoesNotMatch"), ErrorKind.DENIED, "BAD_CREDENTIALS"),
        (refusal(400, "InvalidToken"), ErrorKind.DENIED, "BAD_CREDENTIALS"),
        (refusal(400, "ExpiredToken"), ErrorKind.DENIED, "CREDENTIALS_EXPIRED"),
        (refusal(403, "RequestTimeTooSkewed"), ErrorKind.DENIED, "CLOCK_SKEW"),
        (refusal(404, "NoSuchBucket"), ErrorKind.NOT_FOUND, "NO_SUCH_BUCKET"),
        (refusal(403, "InvalidObjectState"), ErrorKind.FAILED, "ORIGIN_ARCHIVED"),
        (refusal(400, "WhoKnows"), ErrorKind.FAILED, "ORIGIN_REFUSED"),
        (refusal(503, "SlowDown"), ErrorKind.UNAVAILABLE, "ORIGIN_UNAVAILABLE"),
        (refusal(500, "InternalError"), ErrorKind.UNAVAILABLE, "ORIGIN_UNAVAILABLE"),
        (refusal(429, "TooManyRequests"), ErrorKind.UNAVAILABLE, "ORIGIN_UNAVAILABLE"),
        (refusal(400, "RequestTimeout"), ErrorKind.UNAVAILABLE, "ORIGIN_UNAVAILABLE"),
    ],
)
def test_what_the_store_answers_is_told_with_a_way_to_mend_it(
    script: Script, said: Answer, kind: ErrorKind, reason: str
) -> None:
    script.says(said)
    problem = refused(shared_source(script.url))
    assert (problem.kind, problem.reason) == (kind, reason)
    assert problem.temporary == (kind is ErrorKind.UNAVAILABLE)
    assert "s3://models/m/" in problem.message
    assert len(script.asked) == 1  # trying again is up to who asked
    assert "SECRETKEY" not in f"{problem.message}{problem.hint}"


def test_what_the_store_writes_is_harmless(script: Script) -> None:
    script.says(Answer(400, b"<Error><Code>X</Code><Message>one\ntwo\xc2\x9b31m</Message></Error>"))
    assert refused(shared_source(script.url)).message.isprintable()


def test_a_store_says_when_to_ask_again(script: Script) -> None:
    script.says(refusal(503, "SlowDown", ("Retry-After", "7")))
    assert refused(shared_source(script.url)).retry_after_s == 7


@pytest.mark.parametrize(
    "said",
    [
        refusal(400, "AuthorizationHeaderMalformed", details="<Region>eu-west-3</Region>"),
        refusal(301, "PermanentRedirect", ("x-amz-bucket-region", "eu-west-3")),
    ],
)
def test_a_wrong_region_is_told_with_the_right_one(script: Script, said: Answer) -> None:
    script.says(said)
    script.says(Answer(400), method="HEAD")
    problem = refused(source_at(script.url, region="us-east-1"))
    assert (problem.kind, problem.reason) == (ErrorKind.FAILED, "WRONG_REGION")
    assert "eu-west-3" in problem.hint


def test_settings_that_cannot_be_are_told() -> None:
    assert refused(source_at("nonsense")).reason == "BAD_SOURCE"
    assert refused(source_at("http://127.0.0.1:1", region="no such region")).reason == "BAD_SOURCE"


def test_a_store_that_is_away_is_temporary() -> None:
    problem = refused(source_at("http://127.0.0.1:1"))
    assert problem.temporary and problem.reason == "ORIGIN_UNREACHABLE"
    assert "s3://models/m/" in problem.message


def test_buckets_can_be_host_names_and_proxies_are_heeded(script: Script) -> None:
    script.says(refusal(403, "AccessDenied"))
    with environment(**CREDENTIALS, http_proxy=script.url):
        refused(source_at("http://store.test", addressing="virtual"))
        refused(source_at("http://store.test", addressing="path"))
    asked = [path for _, path, _ in script.asked]
    assert asked == ["http://models.store.test/m/SHA256SUMS", "http://store.test/models/m/SHA256SUMS"]


def test_a_private_authority_is_named_in_the_environment(tmp_path: Path) -> None:
    authority, context = make_authority(tmp_path, "127.0.0.1")
    with scripted(context()) as script:
        script.says(refusal(403, "AccessDenied"))
        problem = refused(source_at(script.url))
        assert (problem.kind, problem.reason) == (ErrorKind.DENIED, "ORIGIN_CERTIFICATE")
        assert "AWS_CA_BUNDLE" in problem.hint
        for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"):
            with environment(**CREDENTIALS, **{name: str(authority)}):
                assert refused(source_at(script.url)).reason == "ORIGIN_DENIED"
        with environment(**CREDENTIALS, AWS_CA_BUNDLE="/nonexistent"):
            assert refused(source_at(script.url)).reason == "BAD_CA_BUNDLE"


# --- another server: rclone, which answers ranges with 200 ----------------------------------


@pytest.fixture
def rclone_store(tmp_path: Path) -> Iterator[Store]:
    folder = tmp_path / "buckets" / "models" / "m"
    folder.mkdir(parents=True)
    (folder / "a").write_bytes(DATA)
    with rclone_s3(tmp_path / "buckets") as found:
        yield found


def test_rclones_ranges_are_read(rclone_store: Store, tmp_path: Path) -> None:
    source = source_at(rclone_store.url)
    spec = source.resolve(REF).files[0]
    assert read_range(source, spec, 0, 5120) == DATA
    assert read_range(source, spec, 1000, 3500) == DATA[1000:3500]
    # It heeds no If-Match.
    (tmp_path / "buckets" / "models" / "m" / "a").write_bytes(DATA[::-1])
    assert read_refused(source, spec, 0, 10).reason == "ORIGIN_CHANGED"


def test_rclone_checks_signatures(rclone_store: Store) -> None:
    for wrong in (CREDENTIALS | {"AWS_SECRET_ACCESS_KEY": "wrong"}, CREDENTIALS | {"AWS_ACCESS_KEY_ID": "x"}):
        with environment(**wrong):
            problem = refused(source_at(rclone_store.url))
        assert (problem.kind, problem.reason) == (ErrorKind.DENIED, "BAD_CREDENTIALS")
        assert "'env'" in problem.message


# --- another server: s3rver, which answers ranges with 206 -----------------------------------


def test_s3rvers_ranges_are_read_and_its_refusals_told(tmp_path: Path) -> None:
    with s3rver(tmp_path / "s3rver", "models") as found, environment(**S3RVER_CREDENTIALS):
        found.put("models", {"m/a": DATA})
        source = source_at(found.url)
        spec = source.resolve(REF).files[0]
        answer = found.client.get_object(Bucket="models", Key="m/a", Range="bytes=1-2")
        assert answer["ResponseMetadata"]["HTTPStatusCode"] == 206
        assert read_range(source, spec, 1000, 3500) == DATA[1000:3500]
        # It heeds If-Match.
        found.put("models", {"m/a": DATA[::-1]})
        assert read_refused(source, spec, 0, 10).reason == "ORIGIN_CHANGED"
        problem = refused(source, parse_ref("s3://nobodys/m/"))
        assert (problem.kind, problem.reason) == (ErrorKind.NOT_FOUND, "NO_SUCH_BUCKET")
        with environment(**{**S3RVER_CREDENTIALS, "AWS_ACCESS_KEY_ID": "x"}):
            problem = refused(source_at(found.url))
        assert (problem.kind, problem.reason) == (ErrorKind.DENIED, "BAD_CREDENTIALS")
        # Who signs nothing may read there.
        assert source_at(found.url, anonymous=True).resolve(REF).files[0].path == "a"


# --- what it costs who does not use it ------------------------------------------------------


@pytest.mark.parametrize(
    "code", ["import cached.daemon", "import cached.fetch.worker", "import cached.sources.folder"]
)
def test_nobody_else_loads_boto3(code: str) -> None:
    check = f"{code}; import sys; print([m for m in ('boto3', 'botocore', 'fsspec') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.strip() == "[]"
