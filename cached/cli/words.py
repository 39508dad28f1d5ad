"""Figures and states in the words that people read: sizes, rates, spans of time, claims.

Pure: owns wording only, prints nothing, asks nobody. Time arrives as an argument.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cached.v1 import model_cache_pb2 as pb

_UNITS = ("kB", "MB", "GB", "TB", "PB", "EB")
SHORT_DEVICE = len("cuda:GPU-") + 8
PHASES = ("starting", "resolving", "queued", "fetching", "loading", "waiting")
"""One word for each number of the wire's ``Phase``."""


def size(size_bytes: float) -> str:
    """Bytes in powers of 1000, as configuration writes them: ``90.9 MB``."""
    if size_bytes < 1000:
        return f"{size_bytes:.0f} B"
    for unit in _UNITS:
        size_bytes /= 1000
        # What would be rounded up to 1000.0 is shown in the next unit.
        if size_bytes < 999.95:
            return f"{size_bytes:.1f} {unit}"
    return f"{size_bytes:.1f} {_UNITS[-1]}"


def parse_size(text: str) -> int | None:
    """Bytes of ``40GB`` (powers of 1000), ``40GiB`` (of 1024) or a plain number; None where it is no size."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([kKMGTP]?)(i?)B?", text.strip(), re.ASCII)
    if match is None or (match[3] and not match[2]):
        return None
    power = " KMGTP".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def span(seconds: float) -> str:
    """A span of time in its two largest units: ``45s``, ``3m 20s``, ``2h 5m``, ``3d 4h``."""
    whole = max(0, round(seconds))
    for large, in_large, small, in_small in (
        ("d", 86400, "h", 3600),
        ("h", 3600, "m", 60),
        ("m", 60, "s", 1),
    ):
        if whole >= in_large:
            rest = whole % in_large // in_small
            return f"{whole // in_large}{large}" + (f" {rest}{small}" if rest else "")
    return f"{whole}s"


def ago(at_unix_s: float, now_s: float) -> str:
    """How long since a moment, in one unit: ``12s ago``; ``never`` for 0."""
    if at_unix_s <= 0:
        return "never"
    return span(now_s - at_unix_s).split(" ")[0] + " ago"


def count(number: int, word: str) -> str:
    """``1 pin``, ``2 pins``, ``2 prefetches``."""
    plural = f"{word}es" if word.endswith("ch") else f"{word}s"
    return f"{number} {word if number == 1 else plural}"


def counted(words: list[str]) -> str:
    """``2 leases, 1 pin`` from the single words; empty for none."""
    return ", ".join(count(number, word) for word, number in sorted(Counter(words).items()))


def phase(progress: pb.Progress) -> str:
    """The word for what is being done; a phase of a newer daemon is only ``working``."""
    return PHASES[progress.phase] if progress.phase < len(PHASES) else "working"


def amounts(progress: pb.Progress) -> list[str]:
    """What is known of how far it is: bytes, rate, time left; shorter where less is known."""
    if not progress.bytes_total:
        return []
    known = [f"{size(progress.bytes_done)} of {size(progress.bytes_total)}"]
    if progress.rate_bytes_per_s > 0:
        known.append(f"{size(progress.rate_bytes_per_s)}/s")
    if progress.eta_s >= 0 and progress.rate_bytes_per_s > 0:
        known.append(f"{span(progress.eta_s)} left")
    return known


def percent(progress: pb.Progress) -> str:
    """``42%``, rounded down so that 100% means done; empty where the whole is unknown."""
    if not progress.bytes_total:
        return ""
    return f"{min(100, progress.bytes_done * 100 // progress.bytes_total)}%"


def progress_line(progress: pb.Progress, doing: str = "") -> str:
    """All of it on one line: ``fetching 42%, 1.2 GB of 2.9 GB, 118.0 MB/s, 14s left (why it waits)``.

    ``doing`` stands for the phase where it is given.
    """
    head = f"{doing or phase(progress)} {percent(progress)}".rstrip()
    message = f" ({progress.message})" if progress.message else ""
    return ", ".join([head, *amounts(progress)]) + message


def state(model: pb.Model) -> str:
    """The disk state with what qualifies it: ``verified (unattested)``, ``fetching 42%``."""
    if model.state == "verified" and not model.attested:
        return "verified (unattested)"
    if model.state == "fetching":
        return f"fetching {percent(model.progress)}".rstrip()
    return model.state


def places(model: pb.Model, short: bool = False) -> str:
    """Where it stands, and what is under way there: ``disk, host (unlocked)``, ``disk, host (loading)``.

    ``short`` cuts GPUs' names to what tells them apart.
    """
    by_device = {r.device: r for r in model.residencies}
    devices = [*model.devices, *(d for d in by_device if d not in model.devices)]
    words = []
    for device in devices:
        remark = _residency_remark(by_device[device]) if device in by_device else ""
        name = device[:SHORT_DEVICE] if short else device
        words.append(f"{name} ({remark})" if remark else name)
    return ", ".join(words)


def _residency_remark(residency: pb.Residency) -> str:
    if residency.state != "resident":
        return residency.state
    return "" if residency.locked else "unlocked"


def holder(who: pb.Holder) -> str:
    """``uid 1000 (declares pid 7 on web-1: python serve.py)``: only the uid was seen."""
    uid = "uid unknown" if who.uid < 0 else f"uid {who.uid}"
    place = f" on {who.host}" if who.host else ""
    pod = f" in pod {who.pod}" if who.pod else ""
    command = f": {who.command}" if who.command else ""
    return f"{uid} (declares pid {who.pid}{place}{pod}{command})"


def claim(one: pb.Claim, now_s: float) -> str:
    """``lease on host, made 3m ago, ends in 7m, uid 1000 (declares …)``."""
    facts = [f"{one.kind} on {one.device}", f"made {ago(one.made_at, now_s)}"]
    facts += ["of the configuration file"] if one.of_file else []
    facts += [f"{one.copies} copies"] if one.copies > 1 else []
    facts += [f"priority {one.priority}"] if one.priority else []
    facts += ["also on unclaimed GPUs"] if one.unclaimed else []
    if one.expires_at > 0:
        facts.append(f"ends in {span(one.expires_at - now_s)}")
    if one.HasField("holder"):
        facts.append(holder(one.holder))
    return ", ".join(facts)
