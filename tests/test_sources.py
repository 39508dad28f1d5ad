"""Origins: listings, sizes, and what a lying one is told. The HTTP ones run over a real local server."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.origin import Fault, Origin
from cached.model import MAX_FILES, CachedError, ErrorKind, Problem, Ref, Revision, parse_ref
from cached.sources import Origins, RangesIgnoredError, Source
from cached.sources.sums import parse_sums

HEX = "ab" * 32
OTHER = "cd" * 32


def problem_of(caught: pytest.ExceptionInfo[CachedError]) -> Problem:
    """The problem, which must say what to do."""
    assert caught.value.problem.hint
    return caught.value.problem


# --- SHA256SUMS -----------------------------------------------------------------------------


def test_sums_take_what_sha256sum_writes() -> None:
    data = f"# by hand\n{HEX}  b.bin\n{HEX.upper()} *a.bin\r\n\n{OTHER}  ./sub dir/c.bin\n{HEX}  SHA256SUMS\n"
    assert parse_sums(data.encode(), "here") == {"a.bin": HEX, "b.bin": HEX, "sub dir/c.bin": OTHER}


def test_sums_undo_the_escape_of_a_backslash() -> None:
    assert parse_sums(f"\\{HEX}  a\\\\b\n".encode(), "here") == {"a\\b": HEX}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{HEX}  a\nnonsense\n", "line 2"),
        (f"{HEX[:-1]}  a\n", "line 1"),
        (f"{HEX} a\n", "line 1"),
        (f"{HEX}  a\n{HEX}  a\n", "'a' a second time"),
        (f"{HEX}  a\n{OTHER}  ./a\n", "'a' a second time"),
        (f"{HEX}  a\n{HEX}  a/b\n", "both a file and the folder"),
        ("".join(f"{HEX}  {n}\n" for n in range(MAX_FILES + 1)), f"{MAX_FILES} are the most"),
        ("x" * (8 * 1024 * 1024 + 1), "larger than"),
    ],
)
def test_sums_that_are_no_listing_are_refused(text: str, said: str) -> None:
    with pytest.raises(CachedError) as caught:
        parse_sums(text.encode(), "http://host/m/SHA256SUMS")
    problem = problem_of(caught)
    assert problem.reason == "BAD_SHA256SUMS"
    assert "http://host/m/SHA256SUMS" in problem.message and said in problem.message


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../b", "a//b", "a/./b", "..", "a\x07b", "x" * 600]
)
def test_unsafe_names_are_refused(name: str) -> None:
    with pytest.raises(CachedError) as caught:
        parse_sums(f"{HEX}  {name}\n".encode(), "here")
    assert problem_of(caught).reason == "UNSAFE_PATH"


def test_sums_that_hide_a_line_break_are_refused() -> None:
    with pytest.raises(CachedError) as caught:
        parse_sums(f"\\{HEX}  a\\nb\n".encode(), "here")
    assert problem_of(caught).reason == "UNSAFE_PATH"


def test_empty_and_undecodable_sums_are_refused() -> None:
    with pytest.raises(CachedError, match="names no file"):
        parse_sums(b"\n", "here")
    with pytest.raises(CachedError, match="not UTF-8"):
        parse_sums(b"\xff\xfe", "here")


# --- folders --------------------------------------------------------------------------------


@pytest.fixture
def origins() -> Iterator[Origins]:
    found = Origins(connections=4, timeout_s=2.0)
    yield found
    found.close()


def folder_ref(path: Path) -> Ref:
    return parse_ref(f"file://{path}")


def write_sums(folder: Path, names: list[str]) -> None:
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(lines))


def read_all(source: Source, revision: Revision, index: int, start: int, stop: int) -> bytes:
    reader = source.open(revision.ref, revision.files[index])
    view = memoryview(bytearray(1000))
    try:
        return b"".join(bytes(view[:count]) for count in reader.read(start, stop, lambda: view))
    finally:
        reader.close()


def refused(source: Source, ref: Ref) -> Problem:
    with pytest.raises(CachedError) as caught:
        source.resolve(ref)
    return problem_of(caught)


def test_a_folder_without_sums_is_walked_and_unattested(tmp_path: Path, origins: Origins) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_bytes(b"bb")
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "link").symlink_to("sub/b")
    ref = folder_ref(tmp_path)
    revision = origins.source_for(ref).resolve(ref)
    assert [(f.path, f.size_bytes, f.sha256) for f in revision.files] == [
        ("a", 1, None),
        ("link", 2, None),
        ("sub/b", 2, None),
    ]
    assert not revision.attested
    assert revision.files[0].version == f"{(tmp_path / 'a').stat().st_mtime_ns}:1"
    assert origins.source_for(ref).resolve(ref) == revision


def test_the_key_changes_when_a_file_does(tmp_path: Path, origins: Origins) -> None:
    (tmp_path / "a").write_bytes(b"a")
    ref = folder_ref(tmp_path)
    before = origins.source_for(ref).resolve(ref)
    os.utime(tmp_path / "a", ns=(1, 1))
    assert origins.source_for(ref).resolve(ref).key != before.key


def test_sums_are_the_listing_of_a_folder(tmp_path: Path, origins: Origins) -> None:
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "unlisted").write_bytes(b"x")
    write_sums(tmp_path, ["a"])
    ref = folder_ref(tmp_path)
    revision = origins.source_for(ref).resolve(ref)
    assert [(f.path, f.sha256) for f in revision.files] == [("a", hashlib.sha256(b"a").hexdigest())]
    assert revision.attested


def test_a_folders_name_may_be_percent_encoded(tmp_path: Path, origins: Origins) -> None:
    folder = tmp_path / "my model"
    folder.mkdir()
    (folder / "a").write_bytes(b"a")
    ref = parse_ref(f"file://{tmp_path}/my%20model")
    assert origins.source_for(ref).resolve(ref).files[0].path == "a"


def test_ranges_of_a_folders_file_come_in_pieces(tmp_path: Path, origins: Origins) -> None:
    data = os.urandom(5000)
    (tmp_path / "a").write_bytes(data)
    ref = folder_ref(tmp_path)
    source = origins.source_for(ref)
    revision = source.resolve(ref)
    assert read_all(source, revision, 0, 0, 5000) == data
    assert read_all(source, revision, 0, 1234, 4321) == data[1234:4321]


def test_what_is_missing_or_odd_in_a_folder_is_named(tmp_path: Path, origins: Origins) -> None:
    folder = tmp_path / "m"
    ref = folder_ref(folder)
    source = origins.source_for(ref)
    assert refused(source, ref).reason == "NO_SUCH_FOLDER"
    folder.mkdir()
    assert refused(source, ref).reason == "NO_FILES"
    (folder / "SHA256SUMS").write_text(f"{HEX}  gone.dat\n")
    problem = refused(source, ref)
    assert (problem.kind, problem.reason) == (ErrorKind.NOT_FOUND, "MISSING_FILE")
    assert "gone.dat" in problem.message
    (folder / "gone.dat").mkdir()
    assert "gone.dat" in refused(source, ref).message
    (folder / "gone.dat").rmdir()
    os.mkfifo(folder / "gone.dat")
    assert refused(source, ref).reason == "NOT_A_FILE"


def test_links_out_of_a_folder_are_refused(tmp_path: Path, origins: Origins) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"s")
    (folder / "a").symlink_to("../secret")
    ref = folder_ref(folder)
    source = origins.source_for(ref)
    problem = refused(source, ref)
    assert (problem.kind, problem.reason) == (ErrorKind.DENIED, "UNSAFE_LINK")
    assert str(folder / "a") in problem.message
    (folder / "a").unlink()
    (folder / "a").symlink_to("a")
    assert refused(source, ref).reason == "UNSAFE_LINK"
    (folder / "a").unlink()
    (folder / "up").symlink_to("..")
    assert refused(source, ref).reason == "UNSAFE_LINK"
    (folder / "up").unlink()
    (folder / "SHA256SUMS").symlink_to("../secret")
    assert refused(source, ref).reason == "UNSAFE_LINK"


def test_a_file_that_is_changed_after_it_was_listed_is_noticed(tmp_path: Path, origins: Origins) -> None:
    (tmp_path / "a").write_bytes(b"a" * 5000)
    ref = folder_ref(tmp_path)
    source = origins.source_for(ref)
    revision = source.resolve(ref)
    reader = source.open(ref, revision.files[0])
    view = memoryview(bytearray(1000))
    with pytest.raises(CachedError) as caught:
        for _ in reader.read(0, 5000, lambda: view):
            (tmp_path / "a").write_bytes(b"b" * 2500)
    problem = problem_of(caught)
    assert problem.reason == "ORIGIN_CHANGED" and not problem.temporary
    assert "5000" in problem.message and "2500" in problem.message


# --- HTTP -----------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path: Path) -> Path:
    folder = tmp_path / "m"
    (folder / "sub dir").mkdir(parents=True)
    (folder / "a.dat").write_bytes(bytes(range(256)) * 20)
    (folder / "sub dir" / "ü#?.dat").write_bytes(b"u")
    (folder / "empty").write_bytes(b"")
    write_sums(folder, ["a.dat", "sub dir/ü#?.dat", "empty"])
    return folder


@pytest.fixture
def origin(served: Path) -> Iterator[Origin]:
    with Origin(served.parent) as found:
        yield found


@pytest.fixture
def ref(origin: Origin) -> Ref:
    return parse_ref(origin.url + "m/")


@pytest.fixture
def source(origins: Origins, ref: Ref) -> Source:
    return origins.source_for(ref)


def test_an_http_folder_is_listed_with_sizes_and_etags(source: Source, ref: Ref, origin: Origin) -> None:
    revision = source.resolve(ref)
    assert [(f.path, f.size_bytes) for f in revision.files] == [
        ("a.dat", 5120),
        ("empty", 0),
        ("sub dir/ü#?.dat", 1),
    ]
    assert revision.attested
    assert all(f.version.startswith('"') for f in revision.files)
    # Nothing but the listing was transferred.
    assert set(origin.sent) == {"m/SHA256SUMS"}
    assert source.resolve(ref) == revision


def test_http_ranges_come_in_pieces(source: Source, ref: Ref, served: Path, origin: Origin) -> None:
    data = (served / "a.dat").read_bytes()
    revision = source.resolve(ref)
    assert read_all(source, revision, 0, 0, 5120) == data
    assert read_all(source, revision, 0, 1000, 3500) == data[1000:3500]
    assert read_all(source, revision, 2, 0, 1) == b"u"
    assert origin.sent["m/a.dat"] == 5120 + 2500


def test_leaving_a_range_early_leaves_nothing_behind(source: Source, ref: Ref, served: Path) -> None:
    revision = source.resolve(ref)
    view = memoryview(bytearray(100))
    for _ in range(10):
        reading = source.open(ref, revision.files[0]).read(0, 5120, lambda: view)
        assert next(reading) == 100
        reading.close()
    assert read_all(source, revision, 0, 0, 5120) == (served / "a.dat").read_bytes()


@pytest.mark.parametrize("status", [403, 405, 501])
def test_a_server_without_head_is_asked_for_a_range(
    source: Source, ref: Ref, origin: Origin, status: int
) -> None:
    expected = source.resolve(ref)
    for path in ("m/a.dat", "m/empty"):
        origin.faults[path] = Fault("status", status=status, methods=("HEAD",))
    found = source.resolve(ref)
    assert [f.size_bytes for f in found.files] == [f.size_bytes for f in expected.files]
    assert found.files[0] == expected.files[0]
    assert origin.sent["m/a.dat"] <= 1


def test_http_refusals_name_the_file(source: Source, ref: Ref, served: Path, origin: Origin) -> None:
    (served / "a.dat").unlink()
    problem = refused(source, ref)
    assert (problem.kind, problem.reason) == (ErrorKind.NOT_FOUND, "MISSING_FILE")
    assert ref + "a.dat" in problem.message
    (served / "SHA256SUMS").unlink()
    problem = refused(source, ref)
    assert (problem.kind, problem.reason) == (ErrorKind.NOT_FOUND, "NO_SHA256SUMS")
    assert "sha256sum" in problem.hint


@pytest.mark.parametrize(
    ("status", "kind", "temporary"),
    [
        (401, ErrorKind.DENIED, False),
        (403, ErrorKind.DENIED, False),
        (418, ErrorKind.FAILED, False),
        (429, ErrorKind.UNAVAILABLE, True),
        (500, ErrorKind.UNAVAILABLE, True),
        (503, ErrorKind.UNAVAILABLE, True),
    ],
)
def test_a_status_says_whether_to_try_again(
    source: Source, ref: Ref, origin: Origin, status: int, kind: ErrorKind, temporary: bool
) -> None:
    origin.faults["m/SHA256SUMS"] = Fault("status", status=status, retry_after_s=7)
    problem = refused(source, ref)
    assert (problem.kind, problem.temporary) == (kind, temporary)
    assert str(status) in problem.message
    if temporary:
        assert problem.retry_after_s == 7


def test_an_origin_that_is_gone_is_temporary(
    origins: Origins, source: Source, ref: Ref, origin: Origin
) -> None:
    origin.close()
    problem = refused(source, ref)
    assert problem.temporary and problem.reason == "ORIGIN_UNREACHABLE"
    assert ref in problem.message


def test_redirects_are_followed_but_not_for_ever(
    source: Source, ref: Ref, origin: Origin, served: Path
) -> None:
    origin.faults["moved/SHA256SUMS"] = Fault("redirect", location="/m/SHA256SUMS")
    for name in ("a.dat", "empty", "sub dir/ü#?.dat"):
        origin.faults["moved/" + name] = Fault(
            "redirect",
            location="/m/" + name.replace(" ", "%20").replace("#?", "%23%3F"),
            methods=("GET", "HEAD"),
        )
    moved = parse_ref(origin.url + "moved/")
    revision = source.resolve(moved)
    assert read_all(source, revision, 0, 0, 5120) == (served / "a.dat").read_bytes()
    origin.faults["moved/SHA256SUMS"] = Fault("redirect", location="/moved/SHA256SUMS")
    assert refused(source, moved).reason == "TOO_MANY_REDIRECTS"


def read_refused(source: Source, revision: Revision, start: int, stop: int) -> Problem:
    with pytest.raises(CachedError) as caught:
        read_all(source, revision, 0, start, stop)
    return problem_of(caught)


def test_a_wrong_content_range_is_refused_with_both_values(source: Source, ref: Ref, origin: Origin) -> None:
    revision = source.resolve(ref)
    origin.faults["m/a.dat"] = Fault("wrong_range")
    problem = read_refused(source, revision, 100, 200)
    assert (problem.kind, problem.reason) == (ErrorKind.DATA_LOSS, "BAD_RANGE")
    assert "100-199" in problem.message and "101-200" in problem.message and "a.dat" in problem.message


@pytest.mark.parametrize(("start", "stop"), [(0, 5120), (100, 200), (5000, 5120)])
def test_a_file_of_another_size_is_refused_with_both_values(
    source: Source, ref: Ref, origin: Origin, served: Path, start: int, stop: int
) -> None:
    revision = source.resolve(ref)
    # As from a server that gives no ETag: only the size can tell.
    revision = replace(revision, files=(replace(revision.files[0], version=""), *revision.files[1:]))
    for data in (b"x" * 150, b"x" * 6000):
        (served / "a.dat").write_bytes(data)
        problem = read_refused(source, revision, start, stop)
        assert (problem.kind, problem.reason) == (ErrorKind.DATA_LOSS, "SIZE_MISMATCH")
        assert "a.dat" in problem.message
        assert "5120" in problem.message and str(len(data)) in problem.message


def test_another_etag_means_that_the_file_was_changed(source: Source, ref: Ref, origin: Origin) -> None:
    revision = source.resolve(ref)
    origin.faults["m/a.dat"] = Fault("changed")
    problem = read_refused(source, revision, 0, 100)
    assert problem.reason == "ORIGIN_CHANGED" and not problem.temporary
    assert revision.files[0].version in problem.message


def test_a_server_that_ignores_ranges_gives_the_whole_file_only(
    source: Source, ref: Ref, origin: Origin, served: Path
) -> None:
    revision = source.resolve(ref)
    origin.faults["m/a.dat"] = Fault("no_ranges")
    with pytest.raises(RangesIgnoredError):
        read_all(source, revision, 0, 100, 200)
    assert read_all(source, revision, 0, 0, 5120) == (served / "a.dat").read_bytes()


@pytest.mark.parametrize("kind", ["reset", "truncate"])
def test_a_broken_connection_is_temporary(source: Source, ref: Ref, origin: Origin, kind: str) -> None:
    revision = source.resolve(ref)
    origin.faults["m/a.dat"] = Fault(kind, at_bytes=1500)  # type: ignore[arg-type]
    problem = read_refused(source, revision, 0, 5120)
    assert problem.temporary and "a.dat" in problem.message


def test_a_stalled_connection_is_given_up(ref: Ref, origin: Origin) -> None:
    origins = Origins(connections=1, timeout_s=0.3)
    source = origins.source_for(ref)
    revision = source.resolve(ref)
    origin.faults["m/a.dat"] = Fault("stall", at_bytes=1500)
    problem = read_refused(source, revision, 0, 5120)
    assert problem.temporary and "timed out" in problem.message
    origins.close()
