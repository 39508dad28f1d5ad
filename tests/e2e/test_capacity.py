"""Disk and host are bounded from the first day: evict the coldest, refuse what cannot fit, touch no claim."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit import BIN, NodeKit, eventually, sha256, write_model, write_sums

from benchmarks.origin import Origin

MODEL_BYTES = 10 << 20


@pytest.fixture
def small(tmp_path: Path) -> Iterator[NodeKit]:
    """A node whose disk and host memory take two of these models, not three."""
    config = tmp_path / "cached.toml"
    config.write_text('[store]\ncapacity_bytes = "25MiB"\n[standby]\nhost_capacity_bytes = "25MiB"\n')
    node = NodeKit(tmp_path)
    try:
        node.serve("--config", str(config))
        yield node
    finally:
        node.close()


@pytest.fixture
def refs(tmp_path: Path) -> list[str]:
    for number in range(3):
        write_model(tmp_path / f"m{number}", MODEL_BYTES, seed=number)
    return [f"file://{tmp_path}/m{number}/" for number in range(3)]


def test_the_coldest_unclaimed_one_makes_room(small: NodeKit, refs: list[str]) -> None:
    for ref in refs[:2]:
        small.ctl("prefetch", ref, "--wait")
    small.ctl("path", refs[0])  # used again: now the second is the coldest
    small.ctl("prefetch", refs[2], "--wait")
    assert {row["ref"] for row in small.rows() if row["state"] == "verified"} == {refs[0], refs[2]}
    assert _blob_bytes(small) <= 25 << 20
    small.ctl("verify", "--all")


def test_what_cannot_fit_is_refused_with_the_arithmetic_and_no_claim_is_touched(
    small: NodeKit, refs: list[str]
) -> None:
    for ref in refs[:2]:
        small.ctl("pin", ref, "--wait")
    refused = small.ctl("prefetch", refs[2], "--wait", code=5)
    for figure in ("10.49 MB", "26.21 MB", "20.97 MB"):
        assert figure in refused.stderr, refused.stderr
    assert all(small.row(ref)["state"] == "verified" for ref in refs[:2])
    small.ctl("unpin", refs[0])
    small.ctl("prefetch", refs[2], "--wait")
    assert small.row(refs[0]).get("state") != "verified"
    assert small.row(refs[1])["state"] == "verified"


def test_what_never_fits_is_refused_at_once(small: NodeKit, tmp_path: Path) -> None:
    write_model(tmp_path / "big", 30 << 20)
    refused = small.ctl("prefetch", f"file://{tmp_path}/big/", "--wait", code=5)
    assert "capacity" in refused.stderr and "hint:" in refused.stderr


def test_host_memory_is_bounded_as_well(small: NodeKit, refs: list[str]) -> None:
    for ref in refs[:2]:
        small.ctl("pin", ref, "--on", "host", "--wait")
    small.ctl("unpin", refs[0])
    small.ctl("evict", refs[0])
    small.ctl("pin", refs[2], "--on", "host", "--wait")
    small.ctl("unpin", refs[1])
    # The second one is idle now, on disk and in memory: both make room for the first.
    small.ctl("pin", refs[0], "--on", "host", "--wait")
    devices = {row["ref"]: row["devices"] for row in small.rows()}
    assert devices[refs[0]] == ["disk", "host"] and devices[refs[2]] == ["disk", "host"]
    assert "host" not in devices.get(refs[1], [])
    assert small.metrics()['cached_device_used_bytes{device="host"}'] <= 25 << 20


def test_a_lease_is_never_evicted(small: NodeKit, refs: list[str]) -> None:
    holders = [small.holder(ref) for ref in refs[:2]]
    refused = small.ctl("prefetch", refs[2], "--wait", code=5)
    assert "claimed" in refused.stderr
    manifest = small.data_dir / "artifacts" / f"{small.model(refs[0]).id.removeprefix('sha256:')}.json"
    granted_at = manifest.stat().st_mtime
    holders[0].kill()
    holders[0].wait()
    eventually(lambda: not small.row(refs[0])["claims"])
    eventually(lambda: manifest.stat().st_mtime > granted_at)  # it was in use until now
    small.ctl("prefetch", refs[2], "--wait")


def test_a_full_file_system_is_refused_and_the_daemon_goes_on(
    tmp_path: Path, cold_node: NodeKit, refs: list[str]
) -> None:
    """Somebody else fills it between two measurements: the kernel refuses what should have fitted."""
    node = cold_node
    root = _serve_on_small_disk(node, "28m", "keep_free = 0\n")
    node.ctl("pin", refs[0], "--wait")
    eventually(lambda: node.metrics()["cached_file_system_free_bytes"] < 19 << 20)
    (root / "other").write_bytes(bytes(12 << 20))
    refused = node.ctl("prefetch", refs[1], "--wait", code=5)
    assert "No space left on device" in refused.stderr and "hint:" in refused.stderr
    assert node.is_ready()
    node.ctl("verify", "--all")
    # The operator makes room; the same command works.
    (root / "other").unlink()
    node.ctl("prefetch", refs[1], "--wait")


def test_the_store_gives_way_to_who_fills_the_same_file_system(
    cold_node: NodeKit, tmp_path: Path, refs: list[str]
) -> None:
    node = cold_node
    root = _serve_on_small_disk(node, "64m")
    capacity = node.metrics()['cached_device_capacity_bytes{device="disk"}']
    assert 0.75 * (64 << 20) <= capacity <= 0.8 * (64 << 20), "kubelet collects images above 85 %"
    node.ctl("prefetch", refs[0], "--wait")
    node.ctl("pin", refs[1], "--wait")
    (root / "images").write_bytes(bytes(34 << 20))
    _measure(node, tmp_path / "tiny")
    eventually(lambda: node.row(refs[0]).get("state") != "verified")
    assert node.row(refs[1])["state"] == "verified"
    eventually(lambda: node.metrics()["cached_disk_over_capacity_bytes"] == 0)
    (root / "more").write_bytes(bytes(9 << 20))
    _measure(node, tmp_path / "tiny2")
    eventually(lambda: node.metrics()["cached_disk_over_capacity_bytes"] > 0)
    assert "over its capacity; all of it is claimed" in node.ctl("status").stdout.replace("\n", " ")
    refused = node.ctl("prefetch", refs[0], "--wait", code=5)
    assert "free space on the file system" in refused.stderr
    node.ctl("verify", "--all")


def test_a_disk_that_somebody_fills_midway_is_told_and_the_fetch_goes_on_by_itself(
    cold_node: NodeKit, origin: Origin, refs: list[str]
) -> None:
    node, folder = cold_node, origin.root / "m"
    for number in range(4):
        write_model(folder / f"part{number}", 5 << 20, seed=number, sums=False)
    sums = write_sums(folder)
    ref = f"{origin.url}m/"
    outside = _serve_on_small_disk(node, "40m", "keep_free = 0\n[transfer]\nconnections = 1\n")
    origin.rate.bytes_per_s = 10e6
    node.ctl("pin", ref)
    eventually(lambda: origin.bytes_sent > 7 << 20)
    _fill(outside / "hog")
    eventually(lambda: "DISK_FULL" in node.log())
    # A claim is no larger promise than the disk can keep.
    refused = node.ctl("pin", refs[0], code=5)
    assert "claims" in refused.stderr and "hint: free space" in refused.stderr
    assert node.row(ref)["state"] != "verified" and node.is_ready()
    (outside / "hog").unlink()
    eventually(lambda: node.row(ref)["state"] == "verified", every_s=0.5)
    tree = next((outside / "s" / "trees").iterdir())
    assert {name: sha256(tree / name) for name in sums} == sums
    assert sum(origin.sent.values()) < 30 << 20  # it went on, and did not begin anew


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


def _serve_on_small_disk(node: NodeKit, size: str, store: str = "") -> Path:
    """A daemon on a real small file system: tmpfs, in a mount namespace of its own. Returns it, from here."""
    config = node.root / "small.toml"
    config.write_text(f"[store]\n{store}")
    node.data_dir.mkdir()
    mount = f"mount -t tmpfs -o size={size} none {node.data_dir}"
    serve = f"{BIN}/cached serve --config {config} --data-dir {node.data_dir}/s --run-dir {node.run_dir}"
    command = f"{mount} && exec {serve} --http 127.0.0.1:{node.http_port}"
    with (node.root / "daemon.log").open("ab") as log:
        node.daemon = subprocess.Popen(["unshare", "-Urm", "sh", "-c", command], stdout=log, stderr=log)
    eventually(node.is_ready)
    eventually(lambda: 'cached_device_capacity_bytes{device="disk"}' in node.metrics())
    return Path(f"/proc/{node.daemon.pid}/root{node.data_dir}")


def _measure(node: NodeKit, folder: Path) -> None:
    """What comes to disk has the daemon look how full that is; it is refused where it knows already."""
    write_model(folder, 1000)
    node.ctl("prefetch", f"file://{folder}/", "--wait", code=None)


def _blob_bytes(node: NodeKit) -> int:
    blobs = [p for p in (node.data_dir / "blobs").rglob("*") if p.is_file()]
    for blob in blobs:
        assert sha256(blob) == blob.name
    return sum(p.stat().st_size for p in blobs)
