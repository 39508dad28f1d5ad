"""Pins are promises: they survive everything, and what they ask for is restored untold. And exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import urlopen

import pytest
from kit import BIN, NodeKit, eventually, expect, free_port, running_node, said, sha256, write_model

from benchmarks.origin import Fault, Origin

READ_AGAIN = """
import hashlib, sys, cached
model = cached.acquire(sys.argv[1], timeout_s=60)
print("held", flush=True)
sys.stdin.readline()
print(model.id, model.lease_fd >= 0, flush=True)
with cached.acquire(sys.argv[1], timeout_s=60) as again:
    content = (again.path / "model.safetensors").read_bytes()
    print(hashlib.sha256(content).hexdigest(), flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeKit]:
    """One node for the tests that leave it as it was."""
    with running_node(tmp_path_factory.mktemp("pins")) as running:
        yield running


def _claims(node: NodeKit, ref: str) -> list[tuple[str, str]]:
    return sorted((claim["kind"], claim["device"]) for claim in node.row(ref).get("claims", []))


def _stands(node: NodeKit, ref: str, *devices: str) -> bool:
    row = node.row(ref)
    return row.get("state") == "verified" and set(devices) <= set(row["devices"])


def _health(node: NodeKit, ref: str) -> int:
    try:
        with urlopen(node.url(f"/health/models/{quote(ref, safe='')}"), timeout=5) as answer:
            return int(answer.status)
    except HTTPError as error:
        return error.code


# --- restarts -------------------------------------------------------------------------------


def test_pins_survive_restarts_and_are_restored_untold(
    cold_node: NodeKit, origin: Origin, tmp_path: Path
) -> None:
    """On disk and on host; by SIGTERM, then by SIGKILL of everything; the origin is away then."""
    node = cold_node
    refs = {}
    for number, on in enumerate(("disk", "host")):
        write_model(tmp_path / "origin" / on, seed=number)
        refs[on] = f"{origin.url}{on}/"
    node.serve()
    for on, ref in refs.items():
        node.ctl("pin", ref, "--on", on, "--wait")
        node.ctl("pin", ref, "--on", on, "--wait")  # harmless
    sent = origin.bytes_sent
    origin.close()

    assert node.stop_daemon() == 0
    assert not node.processes("preloader")
    node.serve()
    eventually(lambda: _stands(node, refs["host"], "disk", "host"))
    assert _stands(node, refs["disk"], "disk")

    pids = node.processes("preloader")
    node.kill_daemon()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # a standby ends with its parent
            os.kill(pid, 9)
    node.serve()
    eventually(lambda: _stands(node, refs["host"], "disk", "host"))
    for on, ref in refs.items():
        assert _claims(node, ref) == [("pin", on)]
        assert "pin" in node.ctl("evict", ref, code=1).stderr
    assert origin.bytes_sent == sent
    node.ctl("verify", "--all")


def test_a_pin_outlives_a_kill_in_the_middle_of_its_transfer(
    cold_node: NodeKit, origin: Origin, tmp_path: Path
) -> None:
    folder = tmp_path / "origin" / "m"
    sums = write_model(folder, 40 << 20)
    size = (folder / "model.safetensors").stat().st_size
    ref = f"{origin.url}m/"
    node = cold_node
    node.serve()
    origin.rate.bytes_per_s = 16 << 20
    node.ctl("pin", ref, "--on", "host")
    # The first chunk of three is whole by then; what is not is fetched again.
    eventually(lambda: origin.sent["m/model.safetensors"] > 0.8 * size, every_s=0.01)
    node.kill_daemon()
    origin.rate.bytes_per_s = None
    node.serve()
    eventually(lambda: _stands(node, ref, "disk", "host"))
    assert _claims(node, ref) == [("pin", "host")]
    path = Path(node.ctl("path", ref).stdout.strip())
    assert {name: sha256(path / name) for name in sums} == sums
    assert origin.sent["m/model.safetensors"] < 1.9 * size


def test_a_pin_waits_for_an_origin_that_was_never_there(cold_node: NodeKit, tmp_path: Path) -> None:
    """Made while the origin is away, it is kept over a restart and met once the origin comes."""
    node, port = cold_node, free_port()
    root = tmp_path / "late"
    write_model(root / "m")
    ref = f"http://127.0.0.1:{port}/m/"
    node.serve(with_preloader=False)
    failed = node.ctl("pin", ref, "--wait", code=1, timeout_s=120)
    assert "127.0.0.1" in failed.stderr and "hint:" in failed.stderr
    assert _claims(node, ref) == [("pin", "disk")]
    node.kill_daemon()
    node.serve(with_preloader=False)
    assert _claims(node, ref) == [("pin", "disk")]
    with Origin(root, port=port):
        eventually(lambda: _stands(node, ref, "disk"), within_s=60)


def test_unpinned_stays_unpinned_after_a_restart(cold_node: NodeKit, tmp_path: Path) -> None:
    node = cold_node
    write_model(tmp_path / "m")
    ref = f"file://{tmp_path}/m/"
    node.serve(with_preloader=False)
    node.ctl("pin", ref, "--wait")
    node.ctl("unpin", ref)
    node.kill_daemon()
    node.serve(with_preloader=False)
    assert _claims(node, ref) == []
    node.ctl("evict", ref)
    assert node.row(ref) == {}


def test_a_prefetch_goes_on_after_a_kill_and_leaves_no_claim(
    cold_node: NodeKit, origin: Origin, tmp_path: Path
) -> None:
    node = cold_node
    write_model(tmp_path / "origin" / "m", 4 << 20)
    ref = f"{origin.url}m/"
    origin.rate.bytes_per_s = 2 << 20
    node.serve(with_preloader=False)
    node.ctl("prefetch", ref)
    eventually(lambda: origin.sent["m/model.safetensors"] > 0)
    node.kill_daemon()
    origin.rate.bytes_per_s = None
    node.serve(with_preloader=False)
    eventually(lambda: _stands(node, ref, "disk"))
    eventually(lambda: not node.row(ref)["claims"])
    assert not list((node.data_dir / "claims").iterdir())
    node.ctl("evict", ref)


# --- exit codes -----------------------------------------------------------------------------


def test_unpin_says_whether_there_was_a_pin(shared: NodeKit, tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    ref = f"file://{tmp_path}/m/"
    refused = shared.ctl("unpin", ref, code=3)
    assert "pin" in refused.stderr and "hint:" in refused.stderr
    shared.ctl("pin", ref, "--wait")
    shared.ctl("pin", ref, "--on", "host", "--wait")
    assert "2 pins" in shared.ctl("unpin", ref).stdout
    shared.ctl("unpin", ref, code=3)
    shared.ctl("evict", ref)


def test_prefetch_leaves_nothing_but_the_model(shared: NodeKit, tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    ref = f"file://{tmp_path}/m/"
    shared.ctl("prefetch", ref, "--wait")
    eventually(lambda: shared.row(ref)["claims"] == [])
    shared.ctl("evict", ref)
    assert shared.row(ref) == {}
    shared.ctl("show", ref, code=3)
    shared.ctl("evict", ref, code=3)
    shared.ctl("verify", ref, code=3)


@pytest.mark.parametrize(
    "arguments",
    [
        ("prefetch",),
        ("prefetch", "nonsense"),
        ("prefetch", "nosuch://host/m", "--wait"),
        ("pin", "file:///m", "--on", "tape"),
        ("path", "file:///m", "--ttl", "0"),
        ("path", "file:///m", "--ttl", "99999999"),
        ("ls", "--timeout", "0"),
        ("ls", "--timeout", "nan"),
        ("ls", "-o", "yaml"),
        ("verify",),
        ("frobnicate",),
        ("ls", "--address", "what is this"),
    ],
)
def test_usage_errors_exit_2_with_a_hint(shared: NodeKit, arguments: tuple[str, ...]) -> None:
    refused = shared.ctl(*arguments, code=2)
    assert refused.stderr.startswith("error:") and "hint:" in refused.stderr and not refused.stdout


def test_no_daemon_exits_6(shared: NodeKit, tmp_path: Path) -> None:
    refused = shared.ctl("ls", "--run-dir", str(tmp_path), code=6)
    assert str(tmp_path) in refused.stderr and "hint:" in refused.stderr
    shared.ctl("status", "--address", f"127.0.0.1:{free_port()}", code=6)
    # One that was there and is gone, its socket left behind.
    dead = tmp_path / "cached.sock"
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(dead))
    shared.ctl("ls", "--address", f"unix:{dead}", code=6)


def test_the_deadline_exits_8_and_the_pin_stays(shared: NodeKit, origin: Origin, tmp_path: Path) -> None:
    write_model(tmp_path / "origin" / "m")
    ref = f"{origin.url}m/"
    origin.faults["m/model.safetensors"] = Fault("stall", at_bytes=1000, stall_s=60)
    began = time.monotonic()
    late = shared.ctl("pin", ref, "--wait", "--timeout", "2", code=8)
    assert 2 <= time.monotonic() - began < 10
    assert "2 s" in late.stderr and "hint:" in late.stderr
    assert shared.ctl("path", ref, "--timeout", "1", code=8).stdout == ""
    assert _claims(shared, ref) == [("pin", "disk")]
    shared.ctl("unpin", ref)
    # Nobody wants it any more: the transfer stops, and what is asked next is not in its way.
    eventually(lambda: shared.metrics()["cached_transfers_in_progress"] == 0)


def test_what_never_fits_exits_5(cold_node: NodeKit, tmp_path: Path) -> None:
    write_model(tmp_path / "m", 2 << 20)
    config = tmp_path / "cached.toml"
    config.write_text('[store]\ncapacity_bytes = "1MiB"\n')
    cold_node.serve("--config", str(config), with_preloader=False)
    ref = f"file://{tmp_path}/m/"
    assert "1.05 MB" in cold_node.ctl("pin", ref, "--wait", code=5).stderr
    assert cold_node.ctl("path", ref, code=5).stdout == ""


def test_an_interrupted_wait_ends_quietly_and_its_claim_with_it(
    shared: NodeKit, origin: Origin, tmp_path: Path
) -> None:
    write_model(tmp_path / "origin" / "m", seed=7)
    ref = f"{origin.url}m/"
    origin.faults["m/model.safetensors"] = Fault("stall", at_bytes=1000, stall_s=60)
    waiting = subprocess.Popen(
        [str(BIN / "cachectl"), "path", ref], env=shared.env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    eventually(lambda: _claims(shared, ref))
    waiting.send_signal(2)
    out, err = waiting.communicate(timeout=10)
    assert waiting.returncode == 130 and not out and b"Traceback" not in err
    eventually(lambda: not _claims(shared, ref), within_s=5)
    eventually(lambda: shared.metrics()["cached_transfers_in_progress"] == 0)


# --- corrupt content ------------------------------------------------------------------------


def _flip(node: NodeKit, ref: str, name: str = "model.safetensors") -> Path:
    """Flip one byte of a blob, as a bad disk or a root that should know better does. Returns the blob."""
    digest = next(f.sha256 for f in node.model(ref).files if f.path == name)
    blob = node.data_dir / "blobs" / "sha256" / digest[:2] / digest
    blob.chmod(0o644)
    with blob.open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([byte ^ 0xFF]))
    blob.chmod(0o444)
    return blob


@pytest.mark.parametrize("on", ["disk", "host"])
def test_a_flipped_byte_is_found_quarantined_and_fetched_anew(
    shared: NodeKit, origin: Origin, tmp_path: Path, on: str
) -> None:
    node = shared
    sums = write_model(tmp_path / "origin" / "m", seed={"disk": 20, "host": 21}[on])
    ref = f"{origin.url}m/"
    node.ctl("pin", ref, "--on", on, "--wait")
    node.ctl("verify", ref)
    assert _health(node, ref) == 200
    replica = node.replica(READ_AGAIN, ref)
    expect(replica, "held")
    tree = Path(node.ctl("path", ref).stdout.strip())
    config = origin.sent["m/config.json"]
    blob = _flip(node, ref)

    # Held back, so that what stands between can be seen.
    origin.faults["m/model.safetensors"] = Fault("stall", stall_s=4)
    found = node.ctl("verify", ref, code=4)
    told = " ".join((found.stdout + found.stderr).split())
    assert "model.safetensors" in told and blob.name in told and ref in told and "hint:" in told
    eventually(lambda: _health(node, ref) == 503)
    eventually(lambda: not blob.exists())
    assert not tree.exists()
    (kept,) = [p for p in (node.data_dir / "quarantine").iterdir() if p.name.startswith(blob.name)]
    assert sha256(kept / "blob") != blob.name
    reason = json.loads((kept / "reason.json").read_text())
    assert "model.safetensors" in json.dumps(reason) and blob.name in json.dumps(reason)
    row = node.row(ref)
    assert row["state"] != "verified" and row["devices"] == [] and ("pin", on) in _claims(node, ref)
    assert node.ctl("path", ref, "--timeout", "1", code=8).stdout == ""
    assert replica.poll() is None

    origin.faults.clear()
    # What stalls is cut off, and asked for again.
    eventually(lambda: _stands(node, ref, *{"disk", on}), within_s=90)
    assert _health(node, ref) == 200
    assert {name: sha256(tree / name) for name in sums} == sums
    assert origin.sent["m/config.json"] == config  # what was good is not fetched again
    # The replica that held it went on, and gets the good content when it asks again.
    assert replica.stdin is not None
    replica.stdin.write("\n")
    replica.stdin.flush()
    assert said(replica) == f"{node.model(ref).id} True"
    assert said(replica) == sums["model.safetensors"]
    replica.kill()
    node.ctl("verify", ref)
    node.ctl("unpin", ref)


def test_what_nobody_claims_is_not_fetched_again(shared: NodeKit, origin: Origin, tmp_path: Path) -> None:
    write_model(tmp_path / "origin" / "m", seed=11)
    ref = f"{origin.url}m/"
    shared.ctl("prefetch", ref, "--wait")
    sent = origin.bytes_sent
    _flip(shared, ref)
    shared.ctl("verify", "--all", code=4)
    eventually(lambda: _health(shared, ref) == 503)
    row = json.loads(shared.ctl("show", ref, "-o", "json").stdout)
    assert row["state"] == "quarantined" and "model.safetensors" in row["reason"] and row["hint"]
    time.sleep(1)
    assert origin.bytes_sent == sent
    shared.ctl("prefetch", ref, "--wait")
    assert _health(shared, ref) == 200
    shared.ctl("evict", ref)


def test_a_blob_that_two_models_share_takes_both_down(shared: NodeKit, tmp_path: Path) -> None:
    refs = []
    for name in ("one", "two"):
        write_model(tmp_path / name, seed=12, sums=False)
        (tmp_path / name / "config.json").write_text(json.dumps({"name": name}))
        refs.append(f"file://{tmp_path / name}/")
        shared.ctl("pin", refs[-1], "--wait")
    _flip(shared, refs[0])
    shared.ctl("verify", refs[0], code=4)
    for ref in refs:
        eventually(lambda ref=ref: _stands(shared, ref, "disk"))
        shared.ctl("verify", ref)
        shared.ctl("unpin", ref)


def test_a_blob_of_the_wrong_size_is_found_at_the_start(cold_node: NodeKit, tmp_path: Path) -> None:
    node = cold_node
    write_model(tmp_path / "m")
    ref = f"file://{tmp_path}/m/"
    node.serve(with_preloader=False)
    node.ctl("pin", ref, "--wait")
    artifact = node.model(ref).id
    digest = next(f.sha256 for f in node.model(ref).files if f.path == "model.safetensors")
    assert node.stop_daemon() == 0
    blob = node.data_dir / "blobs" / "sha256" / digest[:2] / digest
    blob.chmod(0o644)
    os.truncate(blob, 100)
    node.serve(with_preloader=False)
    eventually(lambda: _stands(node, ref, "disk"))
    assert node.model(ref).id == artifact
    node.ctl("verify", ref)
    assert [p for p in (node.data_dir / "quarantine").iterdir() if p.name.startswith(digest)]
    assert any(event["level"] == "error" and event.get("ref") == ref for event in node.log_events())


def test_verify_and_acquire_do_not_stand_in_each_others_way(shared: NodeKit, tmp_path: Path) -> None:
    write_model(tmp_path / "m", 8 << 20, seed=13)
    ref = f"file://{tmp_path}/m/"
    shared.ctl("prefetch", ref, "--wait")
    codes: list[int] = []
    threads = [
        threading.Thread(target=lambda: codes.append(shared.ctl("verify", ref, code=None).returncode))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    shared.holder(ref).kill()
    for thread in threads:
        thread.join()
    assert codes == [0, 0]
