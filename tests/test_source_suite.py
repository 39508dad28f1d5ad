"""One suite that every kind of origin passes, each over something real on loopback."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hubkit import Hub
from ocikit import registry
from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import FTPHandler
from pyftpdlib.servers import FTPServer
from s3kit import CREDENTIALS, S3RVER_CREDENTIALS, Store, environment, moto, rclone_s3, s3rver

from benchmarks.origin import Origin
from cached.config import SourceSettings, TransferSettings
from cached.fetch import FetchJob
from cached.fetch.gate import Gate
from cached.fetch.todo import Todo
from cached.fetch.transfer import Transfer
from cached.fetch.wire import Pace
from cached.model import CachedError, ErrorKind, FileSpec, Revision, parse_ref
from cached.sources import Origins

BIG = os.urandom(300_000)
FILES = {"config.json": b"{}", "w.safetensors.d/ü+%#?.dat": BIG, "notes.md": b"# read", "empty": b""}


@dataclass(frozen=True)
class Kind:
    """A running origin. ``put`` makes the files below ``ref`` exactly these; ``attests`` is what it does."""

    ref: str
    put: Callable[[Mapping[str, bytes]], object]
    attests: bool
    settings: SourceSettings
    env: Mapping[str, str] = field(default_factory=dict)


def into(folder: Path, sums: bool) -> Callable[[Mapping[str, bytes]], None]:
    def put(files: Mapping[str, bytes]) -> None:
        for old in folder.rglob("*"):
            if old.is_file():
                old.unlink()
        for path, data in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        if sums:
            lines = [f"{hashlib.sha256(data).hexdigest()}  {path}\n" for path, data in files.items()]
            (folder / "SHA256SUMS").write_text("".join(lines))

    folder.mkdir(parents=True)
    return put


def below(store: Store) -> Callable[[Mapping[str, bytes]], None]:
    """``put`` for the prefix ``m/`` of the bucket ``models``."""

    def put(files: Mapping[str, bytes]) -> None:
        for found in store.client.list_objects_v2(Bucket="models").get("Contents", ()):
            store.client.delete_object(Bucket="models", Key=found["Key"])
        store.put("models", {f"m/{path}": data for path, data in files.items()})

    return put


def s3(store: Store) -> Kind:
    settings = SourceSettings("s3://", endpoint=store.url, addressing="path")
    return Kind("s3://models/m/", below(store), False, settings)


@contextlib.contextmanager
def folder_kind(root: Path) -> Iterator[Kind]:
    yield Kind(f"file://{root}/m/", into(root / "m", False), False, SourceSettings("file://"))


@contextlib.contextmanager
def http_kind(root: Path) -> Iterator[Kind]:
    put = into(root / "m", True)
    with Origin(root) as origin:
        yield Kind(f"{origin.url}m/", put, True, SourceSettings("http://"))


@contextlib.contextmanager
def hub_kind(root: Path) -> Iterator[Kind]:
    with Hub() as hub:
        settings = SourceSettings("hf://", endpoint=hub.url)
        yield Kind("hf://org/m", hub.repo("org/m").commit, True, settings)


@contextlib.contextmanager
def oci_kind(root: Path) -> Iterator[Kind]:
    with registry(root / "registry") as running:
        yield Kind(
            running.ref("m"), lambda files: running.push_model("m", files), True, SourceSettings("oci://")
        )


@contextlib.contextmanager
def moto_kind(root: Path) -> Iterator[Kind]:
    with moto() as store, environment(**CREDENTIALS):
        store.client.create_bucket(Bucket="models")
        yield s3(store)


@contextlib.contextmanager
def rclone_kind(root: Path) -> Iterator[Kind]:
    (root / "buckets" / "models").mkdir(parents=True)
    with rclone_s3(root / "buckets") as store, environment(**CREDENTIALS):
        yield s3(store)


@contextlib.contextmanager
def s3rver_kind(root: Path) -> Iterator[Kind]:
    with s3rver(root / "s3rver", "models") as store, environment(**S3RVER_CREDENTIALS):
        yield s3(store)


@contextlib.contextmanager
def fsspec_kind(root: Path) -> Iterator[Kind]:
    """FTP is one that nothing else of ours speaks."""
    put = into(root / "m", False)
    authorizer = DummyAuthorizer()
    authorizer.add_user("reader", "secret", str(root), perm="elr")

    class Handler(FTPHandler):  # type: ignore[misc]  # pyftpdlib has no types
        pass

    Handler.authorizer = authorizer
    server = FTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"timeout": 0.05, "handle_exit": False})
    thread.start()
    try:
        ref = f"ftp://127.0.0.1:{server.address[1]}/m/"
        options = {"username": "reader", "password": "env:PASSWORD"}
        yield Kind(ref, put, False, SourceSettings(ref, options=options), {"PASSWORD": "secret"})
    finally:
        server.close_all()
        thread.join()


KINDS = [folder_kind, http_kind, hub_kind, oci_kind, moto_kind, rclone_kind, s3rver_kind, fsspec_kind]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__.removesuffix("_kind"))
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kind]:
    with request.param(tmp_path_factory.mktemp("origin")) as found:
        yield found


@pytest.fixture(scope="module")
def origins(kind: Kind) -> Iterator[Origins]:
    found = Origins(4, 5.0, kind.env)
    yield found
    found.close()


@pytest.fixture
def revision(kind: Kind, origins: Origins) -> Revision:
    """What FILES are, as they were put there just now."""
    kind.put(FILES)
    return origins.resolve(parse_ref(kind.ref), kind.settings)


def spec_of(revision: Revision, path: str) -> FileSpec:
    return next(spec for spec in revision.files if spec.path == path)


def read(kind: Kind, origins: Origins, revision: Revision, path: str, start: int, stop: int) -> bytes:
    reader = origins.source_for(revision.ref, kind.settings).open(revision.ref, spec_of(revision, path))
    view = memoryview(bytearray(64 * 1024))
    try:
        return b"".join(bytes(view[:count]) for count in reader.read(start, stop, lambda: view))
    finally:
        reader.close()


WEIGHTS = next(path for path, data in FILES.items() if data is BIG)


def test_the_files_are_listed_in_order_with_their_sizes(
    kind: Kind, origins: Origins, revision: Revision
) -> None:
    assert [(f.path, f.size_bytes) for f in revision.files] == sorted((p, len(d)) for p, d in FILES.items())
    assert revision.attested is kind.attests
    assert revision.ref == parse_ref(kind.ref) == kind.ref
    assert origins.resolve(revision.ref, kind.settings) == revision


def test_any_range_is_that_range(kind: Kind, origins: Origins, revision: Revision) -> None:
    # (s3rver takes bytes=0-0, which is never asked of S3, for the whole file: that is refused.)
    ranges = [(0, len(BIG)), (0, 2), (len(BIG) - 1, len(BIG)), (1000, 200_000), (5, 6), (65_536, 131_072)]

    def one(bounds: tuple[int, int]) -> bytes:
        return read(kind, origins, revision, WEIGHTS, *bounds)

    with ThreadPoolExecutor(4) as executor:
        assert list(executor.map(one, ranges)) == [BIG[start:stop] for start, stop in ranges]


def test_threads_share_a_reader_and_may_leave_it_early(
    kind: Kind, origins: Origins, revision: Revision
) -> None:
    reader = origins.source_for(revision.ref, kind.settings).open(revision.ref, spec_of(revision, WEIGHTS))

    def one(start: int) -> bytes:
        view = memoryview(bytearray(1000))
        reading = reader.read(start, len(BIG), lambda: view)
        got = bytes(view[: next(reading)])
        reading.close()
        return got

    try:
        with ThreadPoolExecutor(4) as executor:
            for start, got in enumerate(executor.map(one, range(12))):
                assert got and BIG[start:].startswith(got)
    finally:
        reader.close()


def test_a_transfer_proves_every_file(
    kind: Kind, origins: Origins, revision: Revision, tmp_path: Path
) -> None:
    job = FetchJob(revision, str(tmp_path), (None,) * len(revision.files), False)
    source = origins.source_for(revision.ref, kind.settings)
    settings = TransferSettings(attempts=1)
    ignore = (lambda index, blob: None, lambda done, got: None)
    manifest = Transfer(job, source, settings, *ignore, Gate(Pace(None, 4, False)), Todo()).run()
    assert manifest.attested is kind.attests
    assert {f.path: f.blob.sha256 for f in manifest.files} == {
        path: hashlib.sha256(data).hexdigest() for path, data in FILES.items()
    }


def test_globs_and_required_digests_hold(kind: Kind, origins: Origins, revision: Revision) -> None:
    chosen = replace(kind.settings, include=("*.md", "w.safetensors.d/"), exclude=("*.dat",))
    assert [f.path for f in origins.resolve(revision.ref, chosen).files] == ["notes.md"]
    strict = replace(kind.settings, require_digest=True)
    if kind.attests:
        assert origins.resolve(revision.ref, strict) == revision
        return
    with pytest.raises(CachedError) as caught:
        origins.resolve(revision.ref, strict)
    assert caught.value.problem.reason == "NOT_ATTESTED"


def test_weights_that_are_pickles_alone_are_refused(kind: Kind, origins: Origins) -> None:
    kind.put({"pytorch_model.bin": b"x", "config.json": b"{}"})
    with pytest.raises(CachedError) as caught:
        origins.resolve(parse_ref(kind.ref), kind.settings)
    assert caught.value.problem.reason == "ONLY_PICKLE"


def test_other_content_is_another_revision_and_never_taken_for_the_old(
    kind: Kind, origins: Origins, revision: Revision
) -> None:
    kind.put({**FILES, WEIGHTS: BIG[::-1] + b"x"})
    later = origins.resolve(revision.ref, kind.settings)
    assert later.key != revision.key
    assert read(kind, origins, later, WEIGHTS, 0, 1000) == BIG[::-1][:1000]
    try:
        assert read(kind, origins, revision, WEIGHTS, 0, 1000) == BIG[:1000]
    except CachedError as error:
        assert not error.problem.temporary and error.problem.hint


def test_what_is_not_there_is_told_as_that(kind: Kind, origins: Origins, revision: Revision) -> None:
    missing = parse_ref(re.sub(r"m(/|:v1)?$", r"nothing\1", kind.ref))
    with pytest.raises(CachedError) as caught:
        origins.resolve(missing, replace(kind.settings, prefix=kind.ref.partition("//")[0] + "//"))
    problem = caught.value.problem
    assert (problem.kind, problem.temporary) == (ErrorKind.NOT_FOUND, False)
    assert problem.hint and "nothing" in problem.message
