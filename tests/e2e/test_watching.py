"""What is shown of a node at work: metrics, log lines, health."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import urlopen

import pytest
from kit import BIN, NodeKit, eventually, free_port, running_node, write_model

from benchmarks.origin import Origin


@dataclass(frozen=True, slots=True)
class Busy:
    """A node after one cold acquire on host and a warm one, both still held, and one refused prefetch."""

    node: NodeKit
    ref: str
    model_bytes: int
    before: dict[str, float]
    after: dict[str, float]


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Busy]:
    root = tmp_path_factory.mktemp("watching")
    sums = write_model(root / "origin" / "m", 2 << 20)
    model_bytes = sum((root / "origin" / "m" / name).stat().st_size for name in sums)
    with running_node(root) as node, Origin(root / "origin") as origin:
        eventually(lambda: node.metrics().get('cached_standby_connected{device="host"}') == 1)
        before = node.metrics()
        ref = f"{origin.url}m/"
        node.holder(ref, "host")
        node.holder(ref, "host")
        node.ctl("prefetch", f"{origin.url}nothing/", "--wait", code=3)
        # Figures that stand are set once a second.
        eventually(lambda: node.metrics()["cached_leases"] == 2)
        yield Busy(node, ref, model_bytes, before, node.metrics())


# --- metrics --------------------------------------------------------------------------------


def test_metrics_are_there_before_anything_has_happened(busy: Busy) -> None:
    """Rates and alerts need the zero before the first one."""
    for name in (
        "cached_origin_bytes_total",
        'cached_transfers_total{outcome="done"}',
        'cached_transfers_total{outcome="refused"}',
        "cached_transfers_in_progress",
        'cached_acquires_total{start="cold"}',
        'cached_acquires_total{start="warm"}',
        "cached_evictions_total",
        "cached_quarantines_total",
        "cached_leases",
        "cached_pins",
        "cached_prefetches",
        *(f'cached_acquire_seconds_count{{phase="{p}"}}' for p in ("resolve", "fetch", "load", "total")),
    ):
        assert busy.before[name] == 0, name
    assert any(n.startswith('cached_build_info{version="') and v == 1 for n, v in busy.before.items())


def test_metrics_tell_transfers_residency_leases_phases_and_cold_starts(busy: Busy) -> None:
    after = busy.after
    expected = {
        "cached_origin_bytes_total": busy.model_bytes,
        'cached_transfers_total{outcome="done"}': 1,
        "cached_transfers_in_progress": 0,
        'cached_loads_total{device="host",outcome="done"}': 1,
        'cached_acquires_total{start="cold"}': 1,
        'cached_acquires_total{start="warm"}': 1,
        "cached_leases": 2,
        "cached_pins": 0,
        'cached_standby_connected{device="host"}': 1,
        'cached_device_artifacts{device="disk"}': 1,
        'cached_device_artifacts{device="host"}': 1,
        'cached_device_used_bytes{device="disk"}': busy.model_bytes,
        'cached_device_used_bytes{device="host"}': busy.model_bytes,
        'cached_acquire_seconds_count{phase="fetch"}': 1,
        'cached_acquire_seconds_count{phase="load"}': 1,
        'cached_acquire_seconds_count{phase="total"}': 2,
    }
    assert {name: after.get(name) for name in expected} == expected
    for device in ("disk", "host"):
        assert after[f'cached_device_capacity_bytes{{device="{device}"}}'] > busy.model_bytes
    assert after['cached_acquire_seconds_count{phase="resolve"}'] >= 1
    total_s = after['cached_acquire_seconds_sum{phase="total"}']
    assert 0 < after['cached_acquire_seconds_sum{phase="load"}'] < total_s < 60
    assert sum(v for n, v in after.items() if n.startswith("cached_problems_total")) == 1
    assert after["process_resident_memory_bytes"] > 0


def test_the_exposition_is_well_formed_and_has_no_endless_labels(busy: Busy) -> None:
    with urlopen(busy.node.url("/metrics"), timeout=5) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        text = answer.read().decode()
    sample = re.compile(r'[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? -?[0-9.e+-]+(Inf)?')
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(sample.fullmatch(line) for line in lines), [x for x in lines if not sample.fullmatch(x)]
    helped = set(re.findall(r"^# HELP (\w+) \S", text, re.M))
    assert helped == set(re.findall(r"^# TYPE (\w+) ", text, re.M)) and len(helped) > 15
    # Neither refs nor artifacts nor holders: of those there is no end.
    for endless in (busy.ref, "sha256:", "lease-"):
        assert endless not in text


def test_leases_end_in_the_metrics_too(busy: Busy, tmp_path: Path) -> None:
    write_model(tmp_path / "m", seed=5)
    holder = busy.node.holder(f"file://{tmp_path}/m/")
    eventually(lambda: busy.node.metrics()["cached_leases"] == 3)
    holder.kill()
    eventually(lambda: busy.node.metrics()["cached_leases"] == 2)


def test_a_lost_standby_shows(cold_node: NodeKit) -> None:
    node = cold_node
    node.serve(with_preloader=False)
    assert 'cached_standby_connected{device="host"}' not in node.metrics()
    node.start_preloader()
    eventually(lambda: node.metrics().get('cached_standby_connected{device="host"}') == 1)
    eventually(lambda: 'cached_device_capacity_bytes{device="host"}' in node.metrics())
    assert node.preloader is not None
    node.preloader.terminate()
    node.preloader.wait(15)
    eventually(lambda: node.metrics()['cached_standby_connected{device="host"}'] == 0)
    assert 'cached_device_capacity_bytes{device="host"}' not in node.metrics()


# --- logs -----------------------------------------------------------------------------------


def test_every_line_of_the_log_is_json_with_time_level_and_event(busy: Busy) -> None:
    lines = busy.node.log().splitlines()
    events = [json.loads(line) for line in lines]
    assert len(events) >= 5
    for event in events:
        age_s = (datetime.now(UTC) - datetime.fromisoformat(event["timestamp"])).total_seconds()
        assert -1 < age_s < 3600 and event["level"] in ("info", "warning", "error") and event["event"]


def test_log_lines_carry_the_ids_of_leases_and_artifacts(busy: Busy) -> None:
    events = busy.node.log_events()
    artifact = busy.node.model(busy.ref).id
    leases = {claim.id for claim in busy.node.leases(busy.ref)}
    for lease in leases:
        mine = [event for event in events if event.get("lease") == lease]
        assert mine and all(event["artifact"] == artifact for event in mine)
        assert any(event.get("uid") == os.geteuid() for event in mine)
    about = [event for event in events if event.get("artifact") == artifact]
    assert any(event.get("ref") == busy.ref for event in about)
    assert any(event.get("device") == "host" and "lease" not in event for event in about)  # its load
    (refused,) = [event for event in events if event["level"] == "warning" and "hint" in event]
    assert refused["reason"] and refused["ref"].endswith("nothing/")


def test_the_end_of_a_lease_is_logged(busy: Busy, tmp_path: Path) -> None:
    write_model(tmp_path / "m", seed=6)
    ref = f"file://{tmp_path}/m/"
    holder = busy.node.holder(ref)
    (claim,) = busy.node.leases(ref)
    holder.kill()
    eventually(lambda: not busy.node.leases(ref))
    assert any(e.get("lease") == claim.id and "ended" in e["event"] for e in busy.node.log_events())


def _read_until(fd: int, words: str, within_s: float = 30) -> str:
    """What a process writes to its terminal until ``words`` came."""
    seen, deadline = "", time.monotonic() + within_s
    os.set_blocking(fd, False)
    while words not in seen:
        assert time.monotonic() < deadline, seen
        try:
            seen += os.read(fd, 65536).decode()
        except BlockingIOError:
            time.sleep(0.02)
    return seen


@pytest.mark.parametrize("no_color", ["1", ""])
def test_on_a_terminal_the_log_is_for_people(cold_node: NodeKit, no_color: str) -> None:
    node = cold_node
    ours, theirs = pty.openpty()
    command = [str(BIN / "cached"), "serve", "--data-dir", str(node.data_dir), "--run-dir", str(node.run_dir)]
    command += ["--http", f"127.0.0.1:{node.http_port}", "--with-preloader"]
    env = {**os.environ, "NO_COLOR": no_color, "TERM": "xterm"}
    node.daemon = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    eventually(node.is_ready)
    seen = _read_until(ours, "standby connected")
    assert ("\x1b[" in seen) == (not no_color)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", seen)
    (line,) = [line for line in plain.splitlines() if "serving" in line]
    assert "{" not in line and str(node.data_dir) in line and "info" in line
    node.daemon.send_signal(2)  # Ctrl-C
    assert node.daemon.wait(20) == 0
    left = _read_until(ours, "parking")
    assert "Traceback" not in seen + left
    assert not node.processes("preloader")
    os.close(ours)


# --- health ---------------------------------------------------------------------------------


def _ask(node: NodeKit, path: str) -> tuple[int, dict[str, str]]:
    try:
        with urlopen(node.url(path), timeout=5) as answer:
            return answer.status, json.loads(answer.read())
    except HTTPError as error:
        body = error.read()
        is_json = error.headers["Content-Type"].startswith("application/json")
        return error.code, json.loads(body) if is_json else {}


@pytest.mark.parametrize("probe", ["startup", "ready", "live"])
def test_probes_say_yes(busy: Busy, probe: str) -> None:
    status, body = _ask(busy.node, f"/health/{probe}")
    assert status == 200 and body["status"]


def test_a_models_probe(busy: Busy) -> None:
    ref = quote(busy.ref, safe="")
    assert _ask(busy.node, f"/health/models/{ref}") == (200, {"ref": busy.ref, "status": "verified"})
    # As people write it: not escaped, and without the slash at its end.
    assert _ask(busy.node, f"/health/models/{busy.ref.rstrip('/')}")[0] == 200
    status, body = _ask(busy.node, "/health/models/" + quote("file:///nowhere", safe=""))
    assert (status, body["status"]) == (503, "absent")
    status, body = _ask(busy.node, "/health/models/nonsense")
    assert status == 400 and body["reason"] == "BAD_REF" and body["hint"]


def test_a_models_probe_turns_with_the_model(busy: Busy, tmp_path: Path) -> None:
    root = tmp_path / "slow"
    write_model(root / "m", 4 << 20, seed=8)
    with Origin(root, rate_bytes_per_s=2 << 20) as origin:
        path = "/health/models/" + quote(f"{origin.url}m/", safe="")
        assert _ask(busy.node, path)[1]["status"] == "absent"
        busy.node.ctl("prefetch", f"{origin.url}m/")
        eventually(lambda: _ask(busy.node, path) == (503, {"ref": f"{origin.url}m/", "status": "fetching"}))
        assert busy.node.metrics()["cached_transfers_in_progress"] == 1
        origin.rate.bytes_per_s = None
        eventually(lambda: _ask(busy.node, path)[0] == 200)
        busy.node.ctl("evict", f"{origin.url}m/")
        assert _ask(busy.node, path)[0] == 503


def test_there_is_nothing_to_operate_over_http(busy: Busy) -> None:
    assert _ask(busy.node, "/admin/drain")[0] == 404
    assert _ask(busy.node, "/")[0] == 404
    with pytest.raises(HTTPError) as refused:
        urlopen(busy.node.url("/health/ready"), data=b"{}", timeout=5)
    assert refused.value.code == 405


def test_a_taken_http_address_is_told(cold_node: NodeKit, busy: Busy) -> None:
    cold_node.http_port = busy.node.http_port
    cold_node.serve(wait=False, with_preloader=False)
    assert cold_node.daemon is not None
    assert cold_node.daemon.wait(20) == 1
    assert "error:" in cold_node.log() and "hint:" in cold_node.log()
    assert str(cold_node.http_port) in cold_node.log()
    cold_node.http_port = free_port()
    cold_node.serve(with_preloader=False)
