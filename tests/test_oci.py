"""``oci://`` against Debian's docker-registry: open, with passwords, and with a token server beside it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from httpkit import Answer, Proxy, Site, make_authority, redirect
from ocikit import (
    DOCKER_IMAGE,
    DOCKER_LIST,
    FILE_PATH,
    IMAGE,
    INDEX,
    MODEL,
    PASSWORD,
    TITLE,
    USER,
    WEIGHT,
    Registry,
    Tokens,
    descriptor,
    digest_of,
    registry,
    tokens,
    with_passwords,
    with_tokens,
)

from cached.config import SourceSettings, TransferSettings
from cached.fetch import FetchJob
from cached.fetch.gate import Gate
from cached.fetch.todo import Todo
from cached.fetch.transfer import Transfer
from cached.fetch.wire import Pace
from cached.model import CachedError, ErrorKind, Manifest, Problem, Revision, parse_ref
from cached.sources import Origins
from cached.sources.oci import MAX_INDEX_ENTRIES, MAX_MANIFEST_BYTES

BIG = os.urandom(50_000)
FILES = {"config.json": b"{}", "sub dir/w ü.dat": BIG, "README.md": b"# read"}
LOGIN = f"{USER}:{PASSWORD}"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("registry") / "root"


@pytest.fixture(scope="module")
def running(root: Path) -> Iterator[Registry]:
    with registry(root) as found:
        for repo in ("team/model", "open"):
            found.push_model(repo, FILES)
        yield found


class Asker:
    """Origins with an environment of their own."""

    def __init__(self, **env: str) -> None:
        self.origins = Origins(4, 5.0, env)

    def resolve(self, ref: str, **fields: Any) -> Revision:
        return self.origins.resolve(parse_ref(ref), SourceSettings("oci://", **fields))

    def read(self, revision: Revision, path: str, start: int, stop: int, **fields: Any) -> bytes:
        spec = next(spec for spec in revision.files if spec.path == path)
        source = self.origins.source_for(revision.ref, SourceSettings("oci://", **fields))
        view = memoryview(bytearray(1000))
        reading = source.open(revision.ref, spec).read(start, stop, lambda: view)
        return b"".join(bytes(view[:count]) for count in reading)

    def refused(self, ref: str, **fields: Any) -> Problem:
        with pytest.raises(CachedError) as caught:
            self.resolve(ref, **fields)
        return problem_in(caught)

    def fetch(self, revision: Revision, folder: Path) -> Manifest:
        folder.mkdir()
        job = FetchJob(revision, str(folder), (None,) * len(revision.files), False)
        source = self.origins.source_for(revision.ref, SourceSettings("oci://"))
        settings = TransferSettings(attempts=1)
        ignore = (lambda index, blob: None, lambda done, got: None)
        return Transfer(job, source, settings, *ignore, Gate(Pace(None, 4, False)), Todo()).run()


def problem_in(caught: pytest.ExceptionInfo[CachedError]) -> Problem:
    """The problem, which must say what to do and no secret."""
    problem = caught.value.problem
    assert problem.hint
    assert not any(secret in problem.message + problem.hint for secret in (PASSWORD, "not-it", "Basic "))
    return problem


@pytest.fixture
def asker() -> Iterator[Asker]:
    found = Asker()
    yield found
    found.origins.close()


# --- what a tag is --------------------------------------------------------------------------


def test_a_tags_layers_are_files_that_are_attested(running: Registry, asker: Asker) -> None:
    revision = asker.resolve(running.ref("team/model"))
    assert [(f.path, f.size_bytes, f.sha256) for f in revision.files] == [
        (path, len(data), hashlib.sha256(data).hexdigest()) for path, data in sorted(FILES.items())
    ]
    assert revision.attested and asker.resolve(revision.ref, require_digest=True) == revision
    assert asker.read(revision, "sub dir/w ü.dat", 0, len(BIG)) == BIG
    assert asker.read(revision, "sub dir/w ü.dat", 1000, 3500) == BIG[1000:3500]


def test_a_fetch_from_a_registry_is_proven_and_a_changed_blob_is_refused(
    running: Registry, asker: Asker, tmp_path: Path
) -> None:
    data = os.urandom(5000)
    running.push_model("changed", {"w.dat": data})
    revision = asker.resolve(running.ref("changed"))
    manifest = asker.fetch(revision, tmp_path / "good")
    assert manifest.attested and manifest.files[0].blob.sha256 == hashlib.sha256(data).hexdigest()
    running.stored(digest_of(data)).write_bytes(b"x" + data[1:])
    with pytest.raises(CachedError) as caught:
        asker.fetch(revision, tmp_path / "bad")
    assert (problem_in(caught).kind, problem_in(caught).reason) == (ErrorKind.DATA_LOSS, "DIGEST_MISMATCH")


def test_a_moved_tag_is_another_revision_and_a_digest_stays(running: Registry, asker: Asker) -> None:
    old = running.push_files("moving", {"a": b"1"}, "latest")
    first = asker.resolve(running.ref("moving", ""))
    running.push_files("moving", {"a": b"2"}, "latest")
    second = asker.resolve(running.ref("moving", ""))
    assert first.key != second.key and first.ref == second.ref == running.ref("moving", ":latest")
    assert asker.read(first, "a", 0, 1) == b"1" and asker.read(second, "a", 0, 1) == b"2"
    # Beside a digest a tag is for people.
    for asked in (f"@{old}", f":latest@{old}"):
        assert asker.read(asker.resolve(running.ref("moving", asked)), "a", 0, 1) == b"1"


def test_plain_layers_are_files_whatever_their_media_type_says(running: Registry, asker: Asker) -> None:
    running.push_files("plain", FILES)
    model = asker.resolve(running.ref("team/model"))
    assert asker.resolve(running.ref("plain")).files == model.files
    both = descriptor(BIG, f"{WEIGHT}.safetensors", {TITLE: "w", FILE_PATH: "sub/w"})
    running.push("both", [(BIG, both)])
    assert [f.path for f in asker.resolve(running.ref("both")).files] == ["sub/w"]


def test_globs_and_pickles_hold_for_registries_too(running: Registry, asker: Asker) -> None:
    running.push_files("pickled", {"a.bin": b"x", "a.safetensors": b"y", "README.md": b"z"})
    ref = running.ref("pickled")
    assert [f.path for f in asker.resolve(ref, exclude=("*.md",)).files] == ["a.safetensors"]
    running.push_files("pickled", {"a.bin": b"x"})
    assert asker.refused(ref).reason == "ONLY_PICKLE"


def test_docker_manifests_are_read_too(running: Registry, asker: Asker) -> None:
    image = running.push(
        "docker", [(BIG, descriptor(BIG, "application/x", {TITLE: "w"}))], mediaType=DOCKER_IMAGE
    )
    size = len(running.stored(image).read_bytes())
    listed = {"mediaType": DOCKER_IMAGE, "digest": image, "size": size, "platform": {"os": "linux"}}
    running.manifest("docker", "list", {"schemaVersion": 2, "mediaType": DOCKER_LIST, "manifests": [listed]})
    for tag in (":v1", ":list"):
        assert [f.path for f in asker.resolve(running.ref("docker", tag)).files] == ["w"]


# --- archives -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("media_type", "annotations"),
    [
        (f"{WEIGHT}.tar", {FILE_PATH: "w.safetensors"}),
        (f"{WEIGHT}.tar+gzip", {FILE_PATH: "w.safetensors"}),
        ("application/vnd.oci.image.layer.v1.tar+gzip", {TITLE: "d", "io.deis.oras.content.unpack": "true"}),
        ("application/vnd.docker.image.rootfs.diff.tar.gzip", {}),
    ],
)
def test_a_layer_that_is_no_file_is_refused_by_name(
    running: Registry, asker: Asker, media_type: str, annotations: dict[str, str]
) -> None:
    packed = BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("w.safetensors"))
    data = packed.getvalue()
    plain = (b"{}", descriptor(b"{}", f"{WEIGHT}.raw", {FILE_PATH: "config.json"}))
    running.push("packed", [plain, (data, descriptor(data, media_type, annotations))])
    problem = asker.refused(running.ref("packed"))
    assert (problem.kind, problem.reason) == (ErrorKind.FAILED, "NOT_A_FILE")
    assert digest_of(data) in problem.message and media_type in problem.message
    assert "oras push" in problem.hint
    if annotations:
        name = next(iter(annotations.values()))
        assert [f.path for f in asker.resolve(running.ref("packed"), exclude=(name,)).files] == [
            "config.json"
        ]


# --- indexes --------------------------------------------------------------------------------


def entry(registry: Registry, digest: str, **more: Any) -> dict[str, Any]:
    size = len(registry.stored(digest).read_bytes())
    return {"mediaType": IMAGE, "digest": digest, "size": size, **more}


def test_of_an_index_the_manifest_that_stands_out_is_taken(running: Registry, asker: Asker) -> None:
    repo = "indexed"
    one, two = (running.push_files(repo, {name: name.encode()}, name) for name in ("one", "two"))
    linux = {"platform": {"os": "linux", "architecture": "amd64"}}
    signed = {"annotations": {"vnd.docker.reference.type": "attestation-manifest"}}
    for entries, expected in [
        ([entry(running, one, **linux)], "one"),
        ([entry(running, one, **linux), entry(running, two, **linux, artifactType=MODEL)], "two"),
        ([entry(running, one), entry(running, two, **linux)], "one"),
        ([entry(running, one, **signed), entry(running, two, **linux)], "two"),
    ]:
        running.manifest(repo, "v1", {"schemaVersion": 2, "mediaType": INDEX, "manifests": entries})
        assert [f.path for f in asker.resolve(running.ref(repo)).files] == [expected]
    entries = [entry(running, one, **linux), entry(running, two, **linux)]
    running.manifest(repo, "v1", {"schemaVersion": 2, "mediaType": INDEX, "manifests": entries})
    problem = asker.refused(running.ref(repo))
    assert problem.reason == "AMBIGUOUS_INDEX" and "@sha256" in problem.hint
    assert one in problem.message and two in problem.message and "linux/amd64" in problem.message
    assert [f.path for f in asker.resolve(running.ref(repo, f"@{two}")).files] == ["two"]


# --- refusals -------------------------------------------------------------------------------


def test_missing_repositories_tags_and_layers_are_told_apart(running: Registry, asker: Asker) -> None:
    problem = asker.refused(running.ref("nobodys"))
    assert (problem.kind, problem.reason) == (ErrorKind.NOT_FOUND, "NO_SUCH_REPO")
    assert f"{running.host}/nobodys" in problem.message and "token_env" in problem.hint
    for asked in (":gone", "@sha256:" + "0" * 64):
        problem = asker.refused(running.ref("open", asked))
        assert (problem.kind, problem.reason) == (ErrorKind.NOT_FOUND, "NO_SUCH_REVISION")
        assert asked[1:] in problem.message and "tags/list" in problem.hint
    data = os.urandom(100)
    running.push_files("holed", {"w": data})
    revision = asker.resolve(running.ref("holed"))
    running.stored(digest_of(data)).unlink()
    with pytest.raises(CachedError) as caught:
        asker.read(revision, "w", 0, 100)
    assert (problem_in(caught).kind, problem_in(caught).reason) == (ErrorKind.NOT_FOUND, "MISSING_FILE")


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ([(b"x", {TITLE: "../x"})], "UNSAFE_PATH"),
        ([(b"x", {TITLE: "/etc/passwd"})], "UNSAFE_PATH"),
        ([(b"x", {TITLE: "a"}), (b"y", {FILE_PATH: "a"})], "BAD_MANIFEST"),
        ([(b"x", {TITLE: "a"}), (b"y", {TITLE: "a/b"})], "BAD_MANIFEST"),
        ([], "NO_FILES"),
    ],
)
def test_names_that_cannot_be_are_refused(
    running: Registry, asker: Asker, layers: list[tuple[bytes, dict[str, str]]], reason: str
) -> None:
    running.push("named", [(data, descriptor(data, f"{WEIGHT}.raw", notes)) for data, notes in layers])
    assert asker.refused(running.ref("named")).reason == reason


# --- registries that lie --------------------------------------------------------------------


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as found:
        yield found


def ref_on(site: Site, asked: str = ":v1") -> str:
    return f"oci://127.0.0.1:{site.port}/m{asked}"


def tells(body: object, **headers: str) -> Answer:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Answer(
        data, headers={"Content-Type": IMAGE, **{k.replace("_", "-"): v for k, v in headers.items()}}
    )


SPEC = descriptor(b"1", "application/x", {TITLE: "w"})
MANIFEST = {"schemaVersion": 2, "layers": [SPEC]}


def test_a_manifest_that_is_not_the_one_of_its_digest_is_refused(site: Site, asker: Asker) -> None:
    found = digest_of(json.dumps(MANIFEST).encode())
    other = "sha256:" + "0" * 64
    site.answers["/v2/m/manifests/v1"] = tells(MANIFEST, Docker_Content_Digest=found)
    assert asker.resolve(ref_on(site)).files[0].path == "w"
    site.answers["/v2/m/manifests/v1"] = tells(MANIFEST, Docker_Content_Digest=other)
    site.answers[f"/v2/m/manifests/{other}"] = tells(MANIFEST)
    for asked in (":v1", f"@{other}", f":v1@{other}"):
        problem = asker.refused(ref_on(site, asked))
        assert (problem.kind, problem.reason) == (ErrorKind.DATA_LOSS, "DIGEST_MISMATCH")
        assert found in problem.message and other in problem.message


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"<html>", "no manifest"),
        (b" " * (MAX_MANIFEST_BYTES + 1), f"larger than {MAX_MANIFEST_BYTES}"),
        (
            {"mediaType": "application/vnd.docker.distribution.manifest.v1+json", "layers": []},
            "manifest.v1+json",
        ),
        ({"layers": [SPEC], "manifests": []}, "neither"),
        ({"mediaType": IMAGE, "manifests": []}, "neither"),
        (
            {"mediaType": INDEX, "manifests": [SPEC] * (MAX_INDEX_ENTRIES + 1)},
            f"{MAX_INDEX_ENTRIES} are the most",
        ),
        ({"layers": [SPEC | {"digest": "sha512:" + "0" * 128}]}, "sha512:00"),
        ({"layers": [SPEC | {"size": -1}]}, "layers[0].size"),
    ],
)
def test_what_is_no_manifest_is_refused_with_the_reason(
    site: Site, asker: Asker, body: object, said: str
) -> None:
    site.answers["/v2/m/manifests/v1"] = tells(body)
    problem = asker.refused(ref_on(site))
    assert (problem.kind, problem.reason) == (ErrorKind.FAILED, "BAD_MANIFEST")
    assert said in problem.message and len(problem.message) < 1000


def test_an_index_of_indexes_is_refused(site: Site, asker: Asker) -> None:
    inner = {"mediaType": INDEX, "manifests": [SPEC]}
    digest = digest_of(json.dumps(inner).encode())
    outer = {"mediaType": INDEX, "manifests": [{"mediaType": IMAGE, "digest": digest, "size": 1}]}
    site.answers["/v2/m/manifests/v1"] = tells(outer)
    site.answers[f"/v2/m/manifests/{digest}"] = tells(inner)
    assert "another index" in asker.refused(ref_on(site)).message


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_registry_that_is_busy_is_asked_again_later(site: Site, asker: Asker, status: int) -> None:
    site.answers["/v2/m/manifests/v1"] = Answer(b"", status, {"Retry-After": "7"})
    problem = asker.refused(ref_on(site))
    assert (problem.kind, problem.retry_after_s) == (ErrorKind.UNAVAILABLE, 7)


# --- who asks -------------------------------------------------------------------------------


def docker_config(folder: Path, **auths: object) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"auths": auths, "credsStore": "desktop"}))
    return str(folder)


def encoded(login: str) -> dict[str, str]:
    return {"auth": base64.b64encode(login.encode()).decode()}


def test_a_registry_with_passwords(root: Path, running: Registry, tmp_path: Path) -> None:
    with with_passwords(root) as guarded:
        ref = guarded.ref("team/model")
        (tmp_path / "login").write_text(f"{LOGIN}\n")
        by_address = docker_config(tmp_path / "one", **{f"http://{guarded.host}/v2/": encoded(LOGIN)})
        docker_config(tmp_path / "home/.docker", **{guarded.host: {"username": USER, "password": PASSWORD}})
        ways: list[tuple[dict[str, str], dict[str, Any]]] = [
            ({"MINE": LOGIN}, {"token_env": "MINE"}),
            ({}, {"token_file": str(tmp_path / "login")}),
            ({"DOCKER_CONFIG": by_address}, {}),
            ({"HOME": str(tmp_path / "home")}, {}),
        ]
        for env, fields in ways:
            asker = Asker(**env)
            revision = asker.resolve(ref, **fields)
            assert asker.read(revision, "sub dir/w ü.dat", 5, 9, **fields) == BIG[5:9]
        for env, fields, hint in [
            ({}, {}, "token_env"),
            ({"DOCKER_CONFIG": by_address}, {"anonymous": True}, "token_env"),
            ({"MINE": f"{USER}:not-it"}, {"token_env": "MINE"}, "not valid"),
            ({"MINE": "not-it"}, {"token_env": "MINE"}, "not valid"),
        ]:
            problem = Asker(**env).refused(ref, **fields)  # type: ignore[arg-type]
            assert (problem.kind, problem.reason) == (ErrorKind.DENIED, "ORIGIN_DENIED")
            assert "UNAUTHORIZED" in problem.message and hint in problem.hint


@pytest.fixture
def token_server(tmp_path: Path) -> Iterator[Tokens]:
    with tokens(tmp_path) as found:
        yield found


def test_a_registry_with_tokens(root: Path, running: Registry, token_server: Tokens) -> None:
    with with_tokens(root, token_server) as guarded:
        asker = Asker(MINE=LOGIN)
        for repo in ("team/model", "open"):
            revision = asker.resolve(guarded.ref(repo), token_env="MINE")
            for _ in range(3):
                assert asker.read(revision, "config.json", 0, 2, token_env="MINE") == b"{}"
        # One for each repository.
        assert [query["scope"] for query, _ in token_server.asked] == [
            ["repository:team/model:pull"],
            ["repository:open:pull"],
        ]
        assert Asker().resolve(guarded.ref("open")).attested
        assert token_server.asked[-1][1] == ""
        for login, hint in [("", "token_env"), (f"{USER}:not-it", "not valid")]:
            fields = {"token_env": "MINE"} if login else {}
            problem = Asker(MINE=login).refused(guarded.ref("team/model"), **fields)
            assert (problem.kind, problem.reason) == (ErrorKind.DENIED, "ORIGIN_DENIED")
            assert token_server.url in problem.message and hint in problem.hint
        # A token of one's own is shown as it is.
        count = len(token_server.asked)
        own = token_server.make("repository:team/model:pull", "registry")
        assert Asker(MINE=own).resolve(guarded.ref("team/model"), token_env="MINE").attested
        assert (
            Asker(MINE="not-it").refused(guarded.ref("team/model"), token_env="MINE").kind is ErrorKind.DENIED
        )
        assert len(token_server.asked) == count


CHALLENGE = 'Basic realm="x, bearer y", Bearer realm="{}", service="s", scope="repository:m:pull"'


def test_a_token_that_ends_in_the_middle_is_renewed(site: Site, asker: Asker) -> None:
    refused = Answer(b"", 401, {"WWW-Authenticate": CHALLENGE.format(f"{site.url}token")})
    given = [Answer(json.dumps({"access_token": name}).encode()) for name in ("one", "two")]
    site.answers["/token?scope=repository%3Am%3Apull&service=s"] = given
    site.answers["/v2/m/manifests/v1"] = [refused, tells(MANIFEST)]
    blob = f"/v2/m/blobs/{SPEC['digest']}"
    site.answers[blob] = [Answer(b"1"), refused, Answer(b"1"), refused]
    revision = asker.resolve(ref_on(site))
    assert asker.read(revision, "w", 0, 1) == asker.read(revision, "w", 0, 1) == b"1"
    shown = [headers.get("Authorization") for _, path, headers in site.asked if path == blob]
    assert shown == ["Bearer one", "Bearer one", "Bearer two"]
    # The same once more is no other, so there is nothing else to show.
    with pytest.raises(CachedError) as caught:
        asker.read(revision, "w", 0, 1)
    assert problem_in(caught).kind is ErrorKind.DENIED


@pytest.mark.parametrize(
    ("realm", "answer"),
    [
        ("ftp://host/token", b""),
        ("http://me:not-it@host/token", b""),
        ("", b""),
        ("{}token", b"not-it"),
        ("{}token", b'{"token": ""}'),
        ("{}token", b'{"token": "not-it\\r\\nX: y"}'),
    ],
)
def test_a_token_server_that_is_none_is_said_to_be_none(
    site: Site, asker: Asker, realm: str, answer: bytes
) -> None:
    challenge = f'Bearer realm="{realm.format(site.url)}"'
    site.answers["/v2/m/manifests/v1"] = Answer(b"", 401, {"WWW-Authenticate": challenge})
    site.answers["/token?scope=repository%3Am%3Apull"] = Answer(answer)
    assert asker.refused(ref_on(site)).reason == "BAD_CHALLENGE"


def test_a_token_server_is_no_way_to_this_machines_services(site: Site) -> None:
    challenge = Answer(b"", 401, {"WWW-Authenticate": f'Bearer realm="{site.url}token"'})
    site.answers["/v2/m/manifests/v1"] = challenge
    with Proxy({"registry.test": site.port}) as proxy:
        asker = Asker(MINE=LOGIN, HTTP_PROXY=proxy.url)
        problem = asker.refused("oci://registry.test/m:v1", endpoint="http://registry.test", token_env="MINE")
    assert (problem.kind, problem.reason) == (ErrorKind.DENIED, "UNSAFE_REDIRECT")
    assert [path for _, path, _ in site.asked] == ["/v2/m/manifests/v1"]


def test_a_token_server_without_tls_is_told_nothing(site: Site, tmp_path: Path) -> None:
    authority, context = make_authority(tmp_path, "127.0.0.1")
    with Site(context()) as secure:
        challenge = Answer(b"", 401, {"WWW-Authenticate": f'Bearer realm="{site.url}token"'})
        secure.answers["/v2/m/manifests/v1"] = challenge
        asker = Asker(MINE=LOGIN, SSL_CERT_FILE=str(authority))
        problem = asker.refused(ref_on(secure), endpoint=secure.url, token_env="MINE")
    assert problem.reason == "BAD_CHALLENGE" and "without TLS" in problem.message
    assert site.asked == []


def test_credentials_stay_with_the_registry_and_layers_may_lie_elsewhere(site: Site) -> None:
    with Site() as store:
        asker = Asker(MINE=LOGIN)
        challenge = Answer(b"", 401, {"WWW-Authenticate": 'Basic realm="here"'})
        site.answers["/v2/m/manifests/v1"] = [challenge, tells(MANIFEST)]
        site.answers[f"/v2/m/blobs/{SPEC['digest']}"] = redirect(f"{store.url}w?signed", 307)
        store.answers["/w?signed"] = Answer(b"1")
        revision = asker.resolve(ref_on(site), token_env="MINE")
        assert asker.read(revision, "w", 0, 1, token_env="MINE") == b"1"
        assert "Authorization" in site.headers_of(f"/v2/m/blobs/{SPEC['digest']}")
        assert "Authorization" not in store.headers_of("/w?signed")


def test_an_endpoint_stands_for_the_registry(running: Registry, asker: Asker) -> None:
    revision = asker.resolve("oci://registry.corp/open:v1", endpoint=f"http://{running.host}/")
    assert asker.read(revision, "config.json", 0, 2, endpoint=f"http://{running.host}/") == b"{}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not docker's config.json"),
        ('{"auths": {"127.0.0.1:PORT": {"auth": "not-it"}}}', "not docker's config.json"),
        ('{"auths": {"127.0.0.1:PORT": {"identitytoken": "not-it"}}}', "an identitytoken"),
    ],
)
def test_docker_credentials_that_cannot_be_read_are_named_by_their_place(
    site: Site, tmp_path: Path, text: str, said: str
) -> None:
    site.answers["/v2/m/manifests/v1"] = Answer(b"", 401, {"WWW-Authenticate": 'Basic realm="here"'})
    (tmp_path / "config.json").write_text(text.replace("PORT", str(site.port)))
    problem = Asker(DOCKER_CONFIG=str(tmp_path)).refused(ref_on(site))
    assert (problem.kind, problem.reason) == (ErrorKind.PRECONDITION, "NO_SECRET")
    assert str(tmp_path / "config.json") in problem.message and said in problem.message
