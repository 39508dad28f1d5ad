"""Origins through fsspec, against two real servers: pyftpdlib's FTP and rclone's SFTP."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import FTPHandler
from pyftpdlib.servers import FTPServer

from cached.config import SourceSettings
from cached.model import CachedError, ErrorKind, FileSpec, Problem, Ref, Revision, parse_ref
from cached.sources import Origins
from tests.s3kit import rclone

USER, PASSWORD = "reader", "a-secret"
DATA = bytes(range(256)) * 4096 * 6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What is served as ``/m``."""
    found = tmp_path / "served" / "m"
    (found / "sub dir").mkdir(parents=True)
    (found / "a").write_bytes(DATA)
    (found / "sub dir" / "ü+%#?").write_bytes(b"u")
    (found / "empty").write_bytes(b"")
    return found


@pytest.fixture
def ftp(folder: Path) -> Iterator[int]:
    """The port of an FTP server."""
    authorizer = DummyAuthorizer()
    authorizer.add_user(USER, PASSWORD, str(folder.parent), perm="elr")

    class Handler(FTPHandler):  # type: ignore[misc]  # pyftpdlib has no types
        auth_failed_timeout = 0.1

    Handler.authorizer = authorizer
    server = FTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"timeout": 0.05, "handle_exit": False})
    thread.start()
    yield server.address[1]
    server.close_all()
    thread.join()


@pytest.fixture
def sftp(folder: Path) -> Iterator[int]:
    with rclone("sftp", folder.parent, "--user", USER, "--pass", PASSWORD, "--dir-cache-time", "1ms") as port:
        yield port


@pytest.fixture(params=["ftp", "sftp"])
def place(request: pytest.FixtureRequest) -> tuple[Ref, SourceSettings]:
    """A ref of the served folder on each server, and the settings that it needs."""
    port = request.getfixturevalue(request.param)
    ref = parse_ref(f"{request.param}://127.0.0.1:{port}/m/")
    return ref, settings_for(ref, "username", "env:PLACE_PASSWORD")


def settings_for(ref: Ref, user_key: str, password: str, **more: Any) -> SourceSettings:
    return SourceSettings(ref, options={user_key: USER, "password": password}, **more)


@pytest.fixture
def origins() -> Iterator[Origins]:
    found = Origins(4, 2.0, {"PLACE_PASSWORD": PASSWORD, "WRONG": "wrong"})
    yield found
    found.close()


Place = tuple[Ref, SourceSettings]


def problem_in(caught: pytest.ExceptionInfo[CachedError]) -> Problem:
    """The problem, which must say what to do and no secret."""
    problem = caught.value.problem
    assert problem.hint and PASSWORD not in problem.message + problem.hint
    return problem


def refused(origins: Origins, ref: Ref, settings: SourceSettings) -> Problem:
    with pytest.raises(CachedError) as caught:
        origins.resolve(ref, settings)
    return problem_in(caught)


def read_range(origins: Origins, place: Place, spec: FileSpec, start: int, stop: int) -> bytes:
    reader = origins.source_for(*place).open(place[0], spec)
    view = memoryview(bytearray(100_000))
    try:
        return b"".join(bytes(view[:count]) for count in reader.read(start, stop, lambda: view))
    finally:
        reader.close()


def spec_of(revision: Revision, path: str) -> FileSpec:
    return next(spec for spec in revision.files if spec.path == path)


def write_sums(folder: Path, names: list[str]) -> None:
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(lines))


def test_a_folder_is_walked_and_unattested(origins: Origins, place: Place) -> None:
    revision = origins.resolve(*place)
    assert [(f.path, f.size_bytes, f.sha256) for f in revision.files] == [
        ("a", len(DATA), None),
        ("empty", 0, None),
        ("sub dir/ü+%#?", 1, None),
    ]
    assert not revision.attested
    assert all(f.version for f in revision.files)
    # Reading changes the time of the last access, and nothing else.
    assert read_range(origins, place, spec_of(revision, "sub dir/ü+%#?"), 0, 1) == b"u"
    assert origins.resolve(*place) == revision


def test_sums_are_the_listing(origins: Origins, place: Place, folder: Path) -> None:
    write_sums(folder, ["a", "sub dir/ü+%#?"])
    revision = origins.resolve(*place)
    assert [f.path for f in revision.files] == ["a", "sub dir/ü+%#?"]
    assert revision.attested and revision.files[0].sha256 == hashlib.sha256(DATA).hexdigest()
    (folder / "a").unlink()
    problem = refused(origins, *place)
    assert (problem.kind, problem.reason) == (ErrorKind.NOT_FOUND, "MISSING_FILE")
    assert place[0] + "a" in problem.message


def test_ranges_are_read_by_threads_at_once(origins: Origins, place: Place) -> None:
    spec = spec_of(origins.resolve(*place), "a")
    step = len(DATA) // 4
    bounds = [(start, start + step) for start in range(0, len(DATA), step)] + [(1000, 1001), (0, len(DATA))]
    with ThreadPoolExecutor(4) as executor:
        found = list(executor.map(lambda b: read_range(origins, place, spec, *b), bounds))
    assert [hashlib.sha256(data).digest() for data in found] == [
        hashlib.sha256(DATA[start:stop]).digest() for start, stop in bounds
    ]


def test_leaving_a_range_early_leaves_nothing_behind(origins: Origins, place: Place) -> None:
    spec = spec_of(origins.resolve(*place), "a")
    reading = (
        origins.source_for(*place).open(place[0], spec).read(0, len(DATA), lambda: memoryview(bytearray(100)))
    )
    assert next(reading) == 100
    reading.close()
    assert read_range(origins, place, spec, 5, 50) == DATA[5:50]


@pytest.mark.parametrize("size", [len(DATA), 100])
def test_a_change_after_the_listing_is_noticed(
    origins: Origins, place: Place, folder: Path, size: int
) -> None:
    spec = spec_of(origins.resolve(*place), "a")
    (folder / "a").write_bytes(DATA[::-1][:size])
    os.utime(folder / "a", (1_000_000, 1_000_000))
    with pytest.raises(CachedError) as caught:
        read_range(origins, place, spec, 0, 2000)
    problem = problem_in(caught)
    assert problem.reason == "ORIGIN_CHANGED" and not problem.temporary


def test_what_is_missing_is_named(origins: Origins, place: Place, folder: Path) -> None:
    ref, settings = place
    other = parse_ref(ref.removesuffix("m/") + "other/")
    problem = refused(origins, other, settings)
    assert (problem.kind, problem.reason) == (ErrorKind.NOT_FOUND, "MISSING_FILE")
    spec = spec_of(origins.resolve(*place), "a")
    (folder / "a").unlink()
    with pytest.raises(CachedError) as caught:
        read_range(origins, place, spec, 0, 10)
    assert problem_in(caught).reason == "MISSING_FILE"


def test_a_wrong_password_is_denied(origins: Origins, place: Place) -> None:
    ref, _ = place
    problem = refused(origins, ref, settings_for(ref, "username", "env:WRONG"))
    assert (problem.kind, problem.reason) == (ErrorKind.DENIED, "ORIGIN_DENIED")
    assert ref in problem.message


def test_filters_hold_here_too(origins: Origins, place: Place) -> None:
    ref, _ = place
    settings = settings_for(ref, "username", "env:PLACE_PASSWORD", exclude=("sub dir/", "empty"))
    assert [f.path for f in origins.resolve(ref, settings).files] == ["a"]


def test_options_that_the_library_does_not_take(origins: Origins, sftp: int) -> None:
    ref = parse_ref(f"sftp://127.0.0.1:{sftp}/m/")
    problem = refused(origins, ref, SourceSettings(ref, options={"no_such": "option"}))
    assert (problem.kind, problem.reason) == (ErrorKind.INVALID, "BAD_SOURCE")
    assert "no_such" in problem.message


def test_an_origin_that_is_away_is_temporary(origins: Origins) -> None:
    for scheme in ("ftp", "sftp"):
        ref = parse_ref(f"{scheme}://127.0.0.1:1/m/")
        problem = refused(origins, ref, SourceSettings(ref))
        assert problem.temporary and problem.reason == "ORIGIN_UNREACHABLE"
        assert ref in problem.message


def test_a_library_that_is_not_installed_is_named(origins: Origins) -> None:
    ref = parse_ref("gs://bucket/m/")
    problem = refused(origins, ref, SourceSettings(ref))
    assert (problem.kind, problem.reason) == (ErrorKind.FAILED, "MISSING_LIBRARY")
    assert "gcsfs" in problem.message
