"""One transfer and one load for everyone who waits; and who waits goes first."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit import NodeKit, eventually, expect, running_node, said, write_model, write_sums

from benchmarks.origin import Fault, Origin
from cached.client.rpc import connect, resolve_address
from cached.model import CHUNK_BYTES
from cached.v1 import operator_pb2 as op
from cached.v1.operator_pb2_grpc import OperatorStub

PROCESSES, THREADS = 5, 10

# Everything is imported before "ready", so that all of them ask within milliseconds of "go".
CROWD = """
import sys, threading, time, cached, cached.client.granting
ref, on, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
ids, errors = [], []
def one():
    try:
        ids.append(cached.acquire(ref, on=on, timeout_s=60).id)
    except cached.CachedError as error:
        errors.append(str(error))
threads = [threading.Thread(target=one) for _ in range(count)]
print("ready", flush=True)
sys.stdin.readline()
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(errors or f"{len(ids)} {' '.join(set(ids))}", flush=True)
sys.stdin.read()
"""

TIMED = """
import sys, time, cached, cached.client.granting
began = time.monotonic()
with cached.acquire(sys.argv[1], on=sys.argv[2], timeout_s=20) as model:
    print(time.monotonic() - began, flush=True)
    print(sum(f.size_bytes for f in model.files), flush=True)
"""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeKit]:
    with running_node(tmp_path_factory.mktemp("flight")) as running:
        yield running


def _go(crowd: list[subprocess.Popen[str]]) -> None:
    for replica in crowd:
        expect(replica, "ready")
    for replica in crowd:
        assert replica.stdin is not None
        replica.stdin.write("\n")
        replica.stdin.flush()


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes by the path that the origin counts under."""
    return {f"{folder.name}/{p.name}": p.stat().st_size for p in folder.iterdir()}


def _seconds(node: NodeKit, ref: str, on: str) -> float:
    """How long one acquire takes, without the start of its process."""
    replica = node.replica(TIMED, ref, on)
    took_s = float(said(replica))
    assert int(said(replica)) > 0
    assert replica.wait(10) == 0
    return took_s


def test_50_acquires_of_one_cold_artifact_are_one_transfer_and_one_load(
    node: NodeKit, origin: Origin, tmp_path: Path
) -> None:
    folder = tmp_path / "origin" / "m"
    write_model(folder, 6 << 20)
    sizes = _sizes(folder)
    sums_bytes = sizes.pop("m/SHA256SUMS")
    origin.rate.bytes_per_s = 4 << 20  # slow enough that everyone comes while it runs
    before = node.metrics()
    ref = f"{origin.url}m/"
    crowd = [node.replica(CROWD, ref, "host", str(THREADS)) for _ in range(PROCESSES)]
    _go(crowd)
    answers = {said(replica) for replica in crowd}
    artifact = node.model(ref).id
    assert answers == {f"{THREADS} {artifact}"}
    assert len(node.leases(ref)) == PROCESSES * THREADS

    sent = dict(origin.sent)
    # Each resolution reads the sums; whoever asks while one runs waits for that one.
    assert sent.pop("m/SHA256SUMS") <= 2 * sums_bytes
    assert sent == sizes
    after = node.metrics()
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    assert grown["cached_origin_bytes_total"] == sum(sizes.values())
    assert grown['cached_transfers_total{outcome="done"}'] == 1
    assert grown['cached_loads_total{device="host",outcome="done"}'] == 1
    assert grown['cached_acquires_total{start="cold"}'] == PROCESSES * THREADS
    assert grown['cached_acquire_seconds_count{phase="fetch"}'] == 1
    assert grown['cached_acquire_seconds_count{phase="load"}'] == 1
    for replica in crowd:
        replica.kill()
    eventually(lambda: not node.leases(ref), within_s=5)


@pytest.mark.parametrize("on", ["disk", "host"])
def test_a_warm_acquire_works_at_once_while_the_origin_is_gone(
    node: NodeKit, origin: Origin, tmp_path: Path, on: str
) -> None:
    write_model(tmp_path / "origin" / "m", seed=1)
    ref = f"{origin.url}m/"
    node.ctl("pin", ref, "--on", on, "--wait")
    with_origin_s = _seconds(node, ref, on)
    origin.close()
    without_s = _seconds(node, ref, on)
    print(f"warm on {on}: {with_origin_s:.3f} s with its origin, {without_s:.3f} s without")
    assert without_s < 2
    # Who insists on the origin is told that it is away.
    refused = node.ctl("prefetch", ref, "--wait", code=1, timeout_s=120)
    assert "127.0.0.1" in refused.stderr
    assert node.row(ref)["state"] == "verified"
    assert _seconds(node, ref, on) < 2


def test_a_stale_note_is_used_at_once_also_while_the_origin_stalls(
    cold_node: NodeKit, origin: Origin, tmp_path: Path
) -> None:
    """An old resolution makes the daemon ask the origin; nobody waits for what comes of that."""
    node = cold_node
    folder = tmp_path / "origin" / "m"
    write_model(folder, seed=2)
    ref = f"{origin.url}m/"
    node.serve(with_preloader=False)
    node.ctl("prefetch", ref, "--wait")
    assert node.stop_daemon() == 0
    (note,) = (node.data_dir / "refs").iterdir()
    content = json.loads(note.read_text())
    note.write_text(json.dumps({**content, "resolved_at": time.time() - 3600}))
    node.serve(with_preloader=False)
    first = node.model(ref).id

    asked = origin.requests["m/SHA256SUMS"]
    origin.faults["m/SHA256SUMS"] = Fault("stall", times=1)
    write_model(folder, seed=3)
    assert _seconds(node, ref, "disk") < 2
    eventually(lambda: origin.requests["m/SHA256SUMS"] > asked)
    assert _seconds(node, ref, "disk") < 2
    assert node.model(ref).id == first


def test_a_stale_note_brings_what_is_new_in_the_background(
    cold_node: NodeKit, origin: Origin, tmp_path: Path
) -> None:
    node = cold_node
    folder = tmp_path / "origin" / "m"
    write_model(folder, seed=2)
    ref = f"{origin.url}m/"
    node.serve(with_preloader=False)
    node.ctl("pin", ref, "--wait")
    assert node.stop_daemon() == 0
    (note,) = (node.data_dir / "refs").iterdir()
    content = json.loads(note.read_text())
    note.write_text(json.dumps({**content, "resolved_at": time.time() - 3600}))
    node.serve(with_preloader=False)
    first = node.model(ref).id
    write_model(folder, seed=3)
    holder = node.holder(ref)
    eventually(lambda: node.model(ref).id != first)
    # The one who came before still holds what he got; the pin went on to the new one.
    node.ctl("evict", first, code=3)  # its ref means something else now
    assert (node.data_dir / "trees" / first.removeprefix("sha256:")).is_dir()
    eventually(lambda: node.model(ref).state == "verified")
    assert [c.kind for c in node.model(ref).claims].count("pin") == 1
    holder.kill()


def test_who_waits_overtakes_queued_prefetches(node: NodeKit, origin: Origin, tmp_path: Path) -> None:
    model_bytes, refs = 1 << 20, []
    for number in range(14):
        write_model(tmp_path / "origin" / f"p{number}", model_bytes, seed=100 + number)
        refs.append(f"{origin.url}p{number}/")
        # None of them gets on: four stand in the workers' way, the others in the queue.
        origin.faults[f"p{number}/model.safetensors"] = Fault("stall", at_bytes=1000, stall_s=5)
    write_model(tmp_path / "origin" / "urgent", model_bytes, seed=99)
    _prefetch(node, refs)
    eventually(lambda: node.metrics()["cached_transfers_in_progress"] == 4)

    took_s = _seconds(node, f"{origin.url}urgent/", "disk")
    print(f"the waiter had its model after {took_s:.2f} s")
    assert not [ref for ref in refs if node.model(ref).state == "verified"]
    origin.faults.clear()
    # What was stopped for it goes on by itself.
    eventually(lambda: not any(row["claims"] for row in node.rows() if row["ref"] in refs))
    assert all(node.model(ref).state == "verified" for ref in refs)
    for ref in refs:
        sent = origin.sent[f"{ref.removeprefix(origin.url)}model.safetensors"]
        assert sent < 2 * model_bytes, f"{ref} was fetched {sent / model_bytes:.1f} times"


def test_who_waits_takes_the_line_from_a_running_prefetch(
    node: NodeKit, origin: Origin, tmp_path: Path
) -> None:
    for name, size_bytes, seed in (("p", 60 << 20, 200), ("u", 24 << 20, 201)):
        write_model(tmp_path / "origin" / name, size_bytes, seed=seed)
    sizes = {name: _sizes(tmp_path / "origin" / name)[f"{name}/model.safetensors"] for name in "pu"}
    origin.rate.bytes_per_s = 12 << 20
    before = node.metrics()["cached_origin_bytes_total"]
    prefetched, waited = f"{origin.url}p/", f"{origin.url}u/"
    _prefetch(node, [prefetched])
    sent = origin.sent
    eventually(lambda: sent["p/model.safetensors"] > 4 << 20)
    replica = node.replica(TIMED, waited, "disk")
    eventually(lambda: sent["u/model.safetensors"] > 0, every_s=0.01)
    # A second later, nearly all that the origin sends is for who waits.
    time.sleep(1)
    then = dict(sent)
    eventually(lambda: sent["u/model.safetensors"] >= 0.9 * sizes["u"], every_s=0.01)
    grown = {name: sent[f"{name}/model.safetensors"] - then[f"{name}/model.safetensors"] for name in "pu"}
    print(f"of the line the waiter had {grown['u'] / sum(grown.values()):.0%}")
    assert grown["u"] >= 0.8 * sum(grown.values())
    said(replica)
    assert node.model(prefetched).state == "fetching"
    origin.rate.bytes_per_s = None
    eventually(lambda: node.model(prefetched).state == "verified")
    # What the prefetch had, it kept: nothing came twice but what was on its way when it let go.
    assert sent["p/model.safetensors"] <= sizes["p"] + 4 * CHUNK_BYTES
    small = sum(sent[f"{name}/config.json"] for name in "pu")
    after = node.metrics()
    assert after["cached_origin_bytes_total"] - before == sum(sizes.values()) + small
    assert after["cached_background_share"] == 1


def test_64_artifacts_that_share_most_contents_cost_each_content_once(
    node: NodeKit, origin: Origin, tmp_path: Path
) -> None:
    shared = [f"{number}".encode() * 20_000 for number in range(100, 109)]
    refs = []
    for number in range(64):
        folder = tmp_path / "origin" / f"m{number}"
        folder.mkdir()
        # Each begins elsewhere, so that those that run together each have what the others want.
        for place in range(9):
            (folder / f"{place}.dat").write_bytes(shared[(place + number) % 9])
        (folder / "own.dat").write_bytes(f"model {number} ".encode() * 5000)
        write_sums(folder)
        refs.append(f"{origin.url}m{number}/")
    own_bytes = sum((tmp_path / "origin" / f"m{number}" / "own.dat").stat().st_size for number in range(64))
    origin.rate.bytes_per_s = 10 << 20
    _prefetch(node, refs)
    eventually(lambda: all(node.model(ref).state == "verified" for ref in refs), within_s=60, every_s=0.5)
    sent = sum(count for path, count in origin.sent.items() if not path.endswith("SHA256SUMS"))
    assert sent == sum(map(len, shared)) + own_bytes


def _prefetch(node: NodeKit, refs: list[str]) -> None:
    with connect(resolve_address(node.run_dir, operator=True)) as channel:
        for ref in refs:
            list(OperatorStub(channel).Prefetch(op.PrefetchRequest(ref=ref), timeout=10))
