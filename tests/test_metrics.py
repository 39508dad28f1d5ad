"""The metrics: what is said is what is scraped, under names that keep to Prometheus's conventions."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from cached.metrics import Metrics


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_known_series_start_at_zero() -> None:
    metrics = Metrics("1.2.3")
    assert value(metrics, "cached_origin_bytes_total") == 0
    assert value(metrics, "cached_transfers_total", outcome="refused") == 0
    assert value(metrics, "cached_acquires_total", start="cold") == 0
    assert value(metrics, "cached_acquire_seconds_count", phase="resolve") == 0
    assert value(metrics, "cached_build_info", version="1.2.3") == 1


def test_what_happened_is_counted() -> None:
    metrics = Metrics("1")
    metrics.received(100)
    metrics.received(23)
    metrics.transfer_ended("done")
    metrics.load_ended("host", "failed")
    metrics.acquired(warm=True)
    metrics.acquired(warm=False)
    metrics.acquired(warm=True)
    metrics.phase_took("load", 0.2)
    metrics.evicted(7)
    metrics.quarantined()
    metrics.problem("DIGEST_MISMATCH")
    assert value(metrics, "cached_origin_bytes_total") == 123
    assert value(metrics, "cached_transfers_total", outcome="done") == 1
    assert value(metrics, "cached_transfers_total", outcome="failed") == 0
    assert value(metrics, "cached_loads_total", device="host", outcome="failed") == 1
    assert value(metrics, "cached_acquires_total", start="warm") == 2
    assert value(metrics, "cached_acquires_total", start="cold") == 1
    assert value(metrics, "cached_acquire_seconds_sum", phase="load") == 0.2
    assert value(metrics, "cached_acquire_seconds_bucket", phase="load", le="0.1") == 0
    assert value(metrics, "cached_acquire_seconds_bucket", phase="load", le="0.25") == 1
    assert value(metrics, "cached_evictions_total") == 1
    assert value(metrics, "cached_evicted_bytes_total") == 7
    assert value(metrics, "cached_quarantines_total") == 1
    assert value(metrics, "cached_problems_total", reason="DIGEST_MISMATCH") == 1


def test_how_things_stand_is_shown() -> None:
    metrics = Metrics("1")
    metrics.set_transfers_in_progress(2)
    metrics.set_claims(leases=3, pins=4, prefetches=5)
    metrics.set_device("disk", used_bytes=10, capacity_bytes=20, artifacts=1)
    assert value(metrics, "cached_transfers_in_progress") == 2
    assert value(metrics, "cached_leases") == 3
    assert value(metrics, "cached_pins") == 4
    assert value(metrics, "cached_prefetches") == 5
    assert value(metrics, "cached_device_used_bytes", device="disk") == 10
    assert value(metrics, "cached_device_capacity_bytes", device="disk") == 20
    assert value(metrics, "cached_device_artifacts", device="disk") == 1


def test_a_standby_that_is_gone_takes_its_figures_with_it() -> None:
    metrics = Metrics("1")
    metrics.set_standby("host", False)
    metrics.set_standby("host", True)
    metrics.set_device("host", used_bytes=10, capacity_bytes=20, artifacts=1)
    metrics.set_device("disk", used_bytes=1, capacity_bytes=2, artifacts=3)
    metrics.set_standby("host", False)
    assert value(metrics, "cached_standby_connected", device="host") == 0
    assert value(metrics, "cached_device_used_bytes", device="host") is None
    assert value(metrics, "cached_device_used_bytes", device="disk") == 1


def test_two_daemons_in_one_process_do_not_share_a_figure() -> None:
    one, other = Metrics("1"), Metrics("1")
    one.received(5)
    assert value(other, "cached_origin_bytes_total") == 0


def test_the_exposition_keeps_to_the_conventions() -> None:
    metrics = Metrics("1")
    metrics.received(100)
    body, content_type = metrics.exposition()
    assert content_type.startswith("text/plain")
    families = {f.name: f for f in text_string_to_metric_families(body.decode())}
    ours = {name: f for name, f in families.items() if not name.startswith("process_")}
    assert len(ours) >= 20
    for name, family in ours.items():
        assert re.fullmatch(r"cached_[a-z_]+", name), name
        assert family.documentation, name
    assert "process_resident_memory_bytes" in families


def test_every_metric_is_documented() -> None:
    text = (Path(__file__).parents[1] / "docs" / "configuration.md").read_text()
    documented = set(re.findall(r"`(cached_[a-z_]+)`", text))
    body, _ = Metrics("1").exposition()
    declared = {
        f.name + ("_total" if f.type == "counter" else "")
        for f in text_string_to_metric_families(body.decode())
    }
    ours = {name for name in declared if name.startswith("cached_") and not name.endswith("_created")}
    assert documented == ours
