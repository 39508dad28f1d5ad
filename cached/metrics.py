"""Every metric, declared once.

Owns the names, help texts, labels and buckets of what ``/metrics`` shows, in a registry of its own. Decides
nothing and measures nothing: whoever knows a figure says it here. Imports prometheus-client only.

Label values are few and known: devices, phases, outcomes, and the stable reasons of our own errors; never
a ref, an artifact or a holder, of which there is no end.
"""

from __future__ import annotations

import contextlib
from typing import Literal

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

Outcome = Literal["done", "failed", "refused", "cancelled"]
"""``failed`` may be tried again, ``refused`` may not."""
OUTCOMES: tuple[Outcome, ...] = ("done", "failed", "refused", "cancelled")

AcquirePhase = Literal["resolve", "fetch", "load", "total"]
ACQUIRE_PHASES: tuple[AcquirePhase, ...] = ("resolve", "fetch", "load", "total")

# From a warm handoff (milliseconds) to a large model over a slow line (half an hour).
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)


class Metrics:
    """The metrics of one daemon. Every series that can be known starts at 0: rates work from the first."""

    def __init__(self, version: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._declare_transfers()
        self._declare_devices()
        self._declare_claims()
        self._problems = self._counter("cached_problems", "Errors by their stable reason", "reason")
        self._gauge("cached_build_info", "Always 1; the version is the label", "version").labels(version).set(
            1
        )

    def _declare_transfers(self) -> None:
        self._origin_bytes = self._counter("cached_origin_bytes", "Bytes received from origins")
        self._transfers = self._counter("cached_transfers", "Ended fetches of a revision", "outcome")
        self._in_progress = self._gauge("cached_transfers_in_progress", "Fetches that run now")
        self._background_share = self._gauge(
            "cached_background_share",
            "The part of its speed that background work may have, by the node's pressure",
        )
        self._background_share.set(1.0)
        self._evictions = self._counter("cached_evictions", "Artifacts removed from disk to make room")
        self._evicted_bytes = self._counter("cached_evicted_bytes", "Bytes freed on disk by evictions")
        self._quarantine = self._gauge("cached_quarantine_bytes", "Bytes of corrupt contents that are kept")
        self._quarantines = self._counter("cached_quarantines", "Blobs set aside because they were corrupt")
        self._scrubbed = self._counter("cached_scrubbed_bytes", "Bytes on disk read again and proven")
        self._scrub_mismatches = self._counter(
            "cached_scrub_mismatches", "Corrupt contents the scrubber found"
        )
        self._scrub_round = self._gauge(
            "cached_scrub_last_round_timestamp_seconds",
            "When all of the disk had last been read again; 0: never",
        )
        for outcome in OUTCOMES:
            self._transfers.labels(outcome)

    def _declare_devices(self) -> None:
        self._used = self._gauge("cached_device_used_bytes", "Bytes of models that stand", "device")
        self._capacity = self._gauge(
            "cached_device_capacity_bytes", "The most that can stand there", "device"
        )
        self._artifacts = self._gauge("cached_device_artifacts", "Artifacts that stand", "device")
        self._file_system = self._gauge("cached_file_system_bytes", "Size of the store's file system")
        self._free = self._gauge("cached_file_system_free_bytes", "Bytes free on the store's file system")
        self._over = self._gauge("cached_disk_over_capacity_bytes", "Bytes above the disk's capacity")
        self._connected = self._gauge("cached_standby_connected", "1 while its standby answers", "device")
        self._gpu_free = self._gauge("cached_gpu_free_bytes", "Bytes that the GPU reports free", "device")
        self._gpu_outside = self._gauge(
            "cached_gpu_outside_bytes", "Bytes given back that somebody has mapped yet", "device"
        )
        self._gpu_unfit = self._gauge("cached_gpu_unfit", "1 while nothing may stand on the GPU", "device")
        self._loads = self._counter("cached_loads", "Ended loads into a device", "device", "outcome")

    def _declare_claims(self) -> None:
        self._leases = self._gauge("cached_leases", "Leases that replicas hold")
        self._pins = self._gauge("cached_pins", "Pins of operators")
        self._prefetches = self._gauge("cached_prefetches", "Prefetches that are not yet met")
        self._acquires = self._counter("cached_acquires", "Handoffs, warm or after a cold start", "start")
        self._seconds = Histogram(
            "cached_acquire_seconds",
            "How long an acquire took in each of its phases",
            ["phase"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        for start in ("cold", "warm"):
            self._acquires.labels(start)
        for phase in ACQUIRE_PHASES:
            self._seconds.labels(phase)

    def _counter(self, name: str, words: str, *labels: str) -> Counter:
        return Counter(name, words, labels, registry=self.registry)

    def _gauge(self, name: str, words: str, *labels: str) -> Gauge:
        return Gauge(name, words, labels, registry=self.registry)

    # --- what happened ------------------------------------------------------------------------

    def received(self, size_bytes: int) -> None:
        """Bytes came from an origin."""
        self._origin_bytes.inc(size_bytes)

    def transfer_ended(self, outcome: Outcome) -> None:
        self._transfers.labels(outcome).inc()

    def load_ended(self, device: str, outcome: Outcome) -> None:
        self._loads.labels(device, outcome).inc()

    def acquired(self, warm: bool) -> None:
        """A replica got its model; ``warm`` when it stood ready before it was asked for."""
        self._acquires.labels("warm" if warm else "cold").inc()

    def phase_took(self, phase: AcquirePhase, seconds: float) -> None:
        self._seconds.labels(phase).observe(seconds)

    def evicted(self, size_bytes: int) -> None:
        self._evictions.inc()
        self._evicted_bytes.inc(size_bytes)

    def quarantined(self) -> None:
        self._quarantines.inc()

    def scrubbed(self, size_bytes: int) -> None:
        self._scrubbed.inc(size_bytes)

    def scrub_mismatch(self) -> None:
        self._scrub_mismatches.inc()

    def set_scrub_round(self, at_unix_s: float) -> None:
        self._scrub_round.set(at_unix_s)

    def problem(self, reason: str) -> None:
        """An error was reported; ``reason`` is the stable word of its Problem."""
        self._problems.labels(reason).inc()

    # --- how things stand ---------------------------------------------------------------------

    def set_transfers_in_progress(self, count: int) -> None:
        self._in_progress.set(count)

    def set_background_share(self, share: float) -> None:
        """0 to 1. It stays 1 where the kernel tells of no pressure."""
        self._background_share.set(share)

    def set_claims(self, leases: int, pins: int, prefetches: int) -> None:
        self._leases.set(leases)
        self._pins.set(pins)
        self._prefetches.set(prefetches)

    def set_device(self, device: str, used_bytes: int, capacity_bytes: int, artifacts: int) -> None:
        """``device`` is ``disk`` or a standby's."""
        self._used.labels(device).set(used_bytes)
        self._capacity.labels(device).set(capacity_bytes)
        self._artifacts.labels(device).set(artifacts)

    def set_gpu(self, device: str, free_bytes: int, outside_bytes: int, unfit: bool) -> None:
        self._gpu_free.labels(device).set(free_bytes)
        self._gpu_outside.labels(device).set(outside_bytes)
        self._gpu_unfit.labels(device).set(int(unfit))

    def set_file_system(self, total_bytes: int, free_bytes: int) -> None:
        """The file system that the store is on, whoever fills it."""
        self._file_system.set(total_bytes)
        self._free.set(free_bytes)

    def set_quarantine(self, size_bytes: int) -> None:
        self._quarantine.set(size_bytes)

    def set_over_capacity(self, size_bytes: int) -> None:
        """By how much the store has more than it may have now, all of it claimed or about to leave."""
        self._over.set(size_bytes)

    def set_standby(self, device: str, connected: bool) -> None:
        """A standby that is gone holds nothing we know of: its figures go, only the 0 stays."""
        self._connected.labels(device).set(int(connected))
        if not connected:
            gpu = (self._gpu_free, self._gpu_outside, self._gpu_unfit)
            for gauge in (self._used, self._capacity, self._artifacts, *gpu):
                with contextlib.suppress(KeyError):
                    gauge.remove(device)

    def exposition(self) -> tuple[bytes, str]:
        """The text that Prometheus scrapes, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
