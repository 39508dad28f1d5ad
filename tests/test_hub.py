"""``hf://`` against a stand-in for the Hub that the real ``huggingface_hub`` client can download from too."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hubkit import GOOD, OTHER, Hub, Repo, git_id
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from cached.config import SourceSettings, TransferSettings
from cached.fetch import FetchJob
from cached.fetch.gate import Gate
from cached.fetch.todo import Todo
from cached.fetch.transfer import Transfer
from cached.fetch.wire import Pace
from cached.model import CachedError, ErrorKind, Manifest, Problem, Ref, Revision, parse_ref
from cached.sources import Origins

REF = Ref("hf://org/name")
SMALL, BIG = b'{"model_type": "test"}', random.Random(1).randbytes(50_000)
FILES = {"config.json": SMALL, "model.safetensors.d/w ü.dat": BIG, "empty": b"", "README.md": b"# read"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as running:
        running.repo("org/name").commit(FILES)
        yield running


@pytest.fixture
def repo(hub: Hub) -> Repo:
    return hub.repo("org/name")


class Asker:
    """Origins with an environment of their own."""

    def __init__(self, hub: Hub, **env: str) -> None:
        self.origins = Origins(4, 5.0, {"HF_ENDPOINT": hub.url, **env})

    def resolve(self, ref: str = REF, **fields: object) -> Revision:
        return self.origins.resolve(parse_ref(ref), SourceSettings("hf://", **fields))  # type: ignore[arg-type]

    def read(self, revision: Revision, path: str, start: int, stop: int, **fields: object) -> bytes:
        settings = SourceSettings("hf://", **fields)  # type: ignore[arg-type]
        spec = next(spec for spec in revision.files if spec.path == path)
        reader = self.origins.source_for(revision.ref, settings).open(revision.ref, spec)
        view = memoryview(bytearray(1000))
        return b"".join(bytes(view[:count]) for count in reader.read(start, stop, lambda: view))

    def refused(self, ref: str = REF, **fields: object) -> Problem:
        with pytest.raises(CachedError) as caught:
            self.resolve(ref, **fields)
        assert caught.value.problem.hint
        return caught.value.problem

    def fetch(self, revision: Revision, folder: Path) -> Manifest:
        folder.mkdir()
        job = FetchJob(revision, str(folder), (None,) * len(revision.files), False)
        source = self.origins.source_for(revision.ref, SourceSettings("hf://"))
        settings = TransferSettings(attempts=2)
        ignore = (lambda index, blob: None, lambda done, got: None)
        return Transfer(job, source, settings, *ignore, Gate(Pace(None, 4, False)), Todo()).run()


@pytest.fixture
def asker(hub: Hub) -> Asker:
    return Asker(hub)


def test_a_branch_becomes_a_commit_and_its_files(asker: Asker, hub: Hub, repo: Repo) -> None:
    revision = asker.resolve()
    commit = repo.names["main"]
    assert {f.path: (f.size_bytes, f.sha256, f.checksum) for f in revision.files} == {
        path: (len(data), hashlib.sha256(data).hexdigest(), "")
        if len(data) >= 1000
        else (len(data), None, f"git:{git_id(data)}")
        for path, data in FILES.items()
    }
    assert [f.path for f in revision.files] == sorted(FILES)
    assert {f.version for f in revision.files} == {commit}
    assert revision.attested
    # Five entries (a folder among them), two a page.
    assert hub.count("hub", "/tree/") == 3 and hub.count("cdn") == 0


def test_the_same_commit_is_the_same_key_and_another_is_another(asker: Asker, repo: Repo) -> None:
    first = asker.resolve()
    assert asker.resolve().key == first.key
    repo.commit({**FILES, "README.md": b"# more"})
    second = asker.resolve()
    assert second.key != first.key
    # What was resolved before is still what it was, for as long as the commit is there.
    assert asker.read(first, "README.md", 0, 6) == b"# read"
    assert asker.read(second, "README.md", 0, 6) == b"# more"


def test_tags_commits_and_refs_with_slashes_are_found(asker: Asker, repo: Repo) -> None:
    old = repo.commit({"a": b"1"}, "v1.0")
    repo.commit({"a": b"2"}, "refs/pr/7")
    for asked, data in [("v1.0", b"1"), (old, b"1"), ("refs/pr/7", b"2")]:
        revision = asker.resolve(f"hf://org/name@{asked}")
        assert asker.read(revision, "a", 0, 1) == data


def test_ranges_come_from_where_the_hub_leads_and_it_is_asked_once(asker: Asker, hub: Hub) -> None:
    revision = asker.resolve()
    path = "model.safetensors.d/w ü.dat"
    spec = next(spec for spec in revision.files if spec.path == path)
    reader = asker.origins.source_for(REF, SourceSettings("hf://")).open(REF, spec)
    view = memoryview(bytearray(1000))

    def read(start: int, stop: int) -> bytes:
        return b"".join(bytes(view[:count]) for count in reader.read(start, stop, lambda: view))

    assert read(0, len(BIG)) == BIG
    assert read(1000, 3500) == BIG[1000:3500]
    assert (hub.count("hub", "/resolve/"), hub.count("cdn")) == (1, 2)
    # Signed addresses lapse: then the Hub is asked once more.
    hub.signature = "2"
    assert read(5, 10) == BIG[5:10]
    assert (hub.count("hub", "/resolve/"), hub.count("cdn")) == (2, 4)


def test_a_fetch_proves_large_files_by_sha256_and_small_ones_by_git(asker: Asker, tmp_path: Path) -> None:
    manifest = asker.fetch(asker.resolve(), tmp_path / "in")
    assert manifest.attested
    found = {file.path: file.blob.sha256 for file in manifest.files}
    assert found == {path: hashlib.sha256(data).hexdigest() for path, data in FILES.items()}


@pytest.mark.parametrize(
    ("path", "wrong", "expected"),
    [
        ("config.json", SMALL.replace(b"test", b"TEST"), f"git:{git_id(SMALL)}"),
        ("model.safetensors.d/w ü.dat", b"x" + BIG[1:], hashlib.sha256(BIG).hexdigest()),
    ],
)
def test_a_file_that_is_not_the_listed_one_is_refused_with_both_values(
    asker: Asker, hub: Hub, tmp_path: Path, path: str, wrong: bytes, expected: str
) -> None:
    revision = asker.resolve()
    hub.wrong[path] = wrong
    with pytest.raises(CachedError) as caught:
        asker.fetch(revision, tmp_path / "in")
    problem = caught.value.problem
    assert (problem.kind, problem.reason) == (ErrorKind.DATA_LOSS, "DIGEST_MISMATCH")
    assert path in problem.message and expected in problem.message
    found = git_id(wrong) if expected.startswith("git:") else hashlib.sha256(wrong).hexdigest()
    assert found in problem.message


# --- tokens ---------------------------------------------------------------------------------


def test_a_token_goes_to_the_hub_and_not_where_that_leads(hub: Hub, tmp_path: Path) -> None:
    hub.repo("org/name").private = True
    (tmp_path / "token").write_text(f"{GOOD}\n")
    home = tmp_path / "home" / ".cache" / "huggingface"
    home.mkdir(parents=True)
    (home / "token").write_text(GOOD)
    ways: list[tuple[dict[str, str], dict[str, object]]] = [
        ({"HF_TOKEN": GOOD}, {}),
        ({"HF_TOKEN_PATH": str(tmp_path / "token")}, {}),
        ({"HF_HOME": str(tmp_path)}, {}),
        ({"HOME": str(tmp_path / "home")}, {}),
        ({"MINE": GOOD, "HF_TOKEN": OTHER}, {"token_env": "MINE"}),
        ({"HF_TOKEN": OTHER}, {"token_file": str(tmp_path / "token")}),
    ]
    for env, fields in ways:
        hub.asked.clear()
        asker = Asker(hub, **env)
        revision = asker.resolve(**fields)
        assert asker.read(revision, "model.safetensors.d/w ü.dat", 0, 5, **fields) == BIG[:5]
        assert {asked.token for asked in hub.asked if asked.where == "hub"} == {GOOD}
        assert {asked.token for asked in hub.asked if asked.where == "cdn"} == {""}


def test_anonymous_sends_no_token_that_lies_about(hub: Hub) -> None:
    Asker(hub, HF_TOKEN=GOOD).resolve(anonymous=True)
    assert {asked.token for asked in hub.asked} == {""}


def test_an_endpoint_of_the_table_outranks_the_environments(hub: Hub) -> None:
    asker = Asker(hub, HF_ENDPOINT="http://127.0.0.1:9")
    assert asker.resolve(endpoint=hub.url + "/").attested


# --- refusals -------------------------------------------------------------------------------


def test_missing_private_and_refused_are_told_apart(hub: Hub, asker: Asker) -> None:
    hub.repo("org/secret").private = True
    for who, hint in [(asker, "HF_TOKEN"), (Asker(hub, HF_TOKEN=OTHER), "let this node's token")]:
        for name in ("org/nothing", "org/secret"):
            problem = who.refused(f"hf://{name}")
            assert (problem.kind, problem.reason) == (ErrorKind.NOT_FOUND, "NO_SUCH_REPO")
            assert f"{hub.url}/{name}" in problem.message and hint in problem.hint
    problem = asker.refused("hf://org/name@nowhere")
    assert (problem.kind, problem.reason) == (ErrorKind.NOT_FOUND, "NO_SUCH_REVISION")
    assert "nowhere" in problem.message
    problem = Asker(hub, HF_TOKEN="hf_lapsed").refused()
    assert (problem.kind, problem.reason) == (ErrorKind.DENIED, "ORIGIN_DENIED")
    assert "Invalid credentials" in problem.message and "hf_lapsed" not in problem.message + problem.hint


@pytest.mark.parametrize(("token", "hint"), [("", "HF_TOKEN"), (OTHER, "the account whose token")])
def test_a_gated_model_says_where_its_terms_are(hub: Hub, repo: Repo, token: str, hint: str) -> None:
    repo.gated = True
    asker = Asker(hub, HF_TOKEN=token)
    revision = asker.resolve()
    with pytest.raises(CachedError) as caught:
        asker.read(revision, "config.json", 0, 5)
    problem = caught.value.problem
    assert (problem.kind, problem.reason) == (ErrorKind.DENIED, "GATED_REPO")
    assert f"{hub.url}/org/name" in problem.hint and hint in problem.hint
    good = Asker(hub, HF_TOKEN=GOOD)
    assert good.read(good.resolve(), "config.json", 0, 5) == SMALL[:5]


def test_a_token_that_is_named_and_not_there_is_an_error_before_anything_is_asked(hub: Hub) -> None:
    assert Asker(hub).refused(token_env="MINE").reason == "NO_SECRET"
    assert hub.asked == []


def test_a_next_page_on_another_server_is_not_asked_for(asker: Asker, hub: Hub) -> None:
    hub.next_page_at = hub.cdn
    assert asker.refused().reason == "BAD_LISTING"
    assert hub.count("cdn") == 0


def test_what_is_no_hub_is_said_to_be_none(tmp_path: Path, hub: Hub) -> None:
    from benchmarks.origin import Origin

    folder = tmp_path / "api" / "models" / "org" / "name" / "revision"
    folder.mkdir(parents=True)
    (folder / "main").write_text("<html>")
    with Origin(tmp_path) as origin:
        asker = Asker(hub, HF_ENDPOINT=origin.url.rstrip("/"))
        problem = asker.refused()
        assert problem.reason == "BAD_LISTING" and "HF_ENDPOINT" in problem.hint
        (folder / "main").write_text('{"sha": "../../etc"}')
        assert asker.refused().reason == "BAD_LISTING"


def test_unsafe_names_in_a_tree_are_refused(asker: Asker, repo: Repo) -> None:
    repo.commit({"../x": b"x"})
    assert asker.refused().reason == "UNSAFE_PATH"
    repo.commit({})
    assert asker.refused().reason == "NO_FILES"


def test_globs_and_pickles_hold_for_the_hub_too(asker: Asker, repo: Repo) -> None:
    repo.commit({"a.bin": b"x", "a.safetensors": b"y", "README.md": b"z"})
    assert [f.path for f in asker.resolve(exclude=("*.md",)).files] == ["a.safetensors"]
    repo.commit({"a.bin": b"x"})
    assert asker.refused().reason == "ONLY_PICKLE"


# --- the stand-in is a Hub ------------------------------------------------------------------


def test_the_real_client_downloads_the_same_from_the_stand_in(hub: Hub, tmp_path: Path) -> None:
    found = snapshot_download("org/name", endpoint=hub.url, cache_dir=tmp_path, token=False)
    assert Path(found).name == hub.repo("org/name").names["main"]
    got = {str(p.relative_to(found)): p.read_bytes() for p in Path(found).rglob("*") if p.is_file()}
    assert got == FILES
    assert hub.count("cdn") == 1


def test_the_real_client_hears_the_same_refusals(hub: Hub, tmp_path: Path) -> None:
    hub.repo("org/gated").commit(FILES)
    hub.repo("org/gated").gated = True
    for name, revision, error in [
        ("org/nothing", "main", RepositoryNotFoundError),
        ("org/name", "nowhere", RevisionNotFoundError),
        ("org/gated", "main", GatedRepoError),
    ]:
        with pytest.raises(error):
            snapshot_download(
                name, revision=revision, endpoint=hub.url, cache_dir=tmp_path, token=False, max_workers=1
            )
