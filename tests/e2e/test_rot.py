"""A disk that changes its mind is found out without anybody asking, and what was lost comes back."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from kit import NodeKit, eventually, sha256, write_model

from benchmarks.origin import Fault, Origin


def _health(node: NodeKit, ref: str) -> int:
    try:
        with urllib.request.urlopen(node.url(f"/health/models/{urllib.parse.quote(ref, safe='')}")) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def _flip_bits(blob: Path) -> None:
    blob.chmod(0o644)
    with blob.open("r+b") as file:
        file.seek(300_000)
        file.write(bytes(byte ^ 0x10 for byte in b"0123"))
    blob.chmod(0o444)


def test_the_scrubber_finds_flipped_bits_and_the_file_is_restored(
    cold_node: NodeKit, origin: Origin, tmp_path: Path
) -> None:
    node = cold_node
    sums = write_model(tmp_path / "origin" / "m", 8 << 20)
    ref = f"{origin.url}m/"
    config = tmp_path / "cached.toml"
    config.write_text(
        '[store]\nscrub_bytes_per_s = "500 MB/s"\nscrub_every_s = 1\n[transfer]\nattempts = 1\n'
    )
    node.serve("--config", str(config), with_preloader=False)
    node.ctl("pin", ref, "--wait")
    eventually(lambda: node.metrics()["cached_scrubbed_bytes_total"] > 8 << 20)
    assert node.metrics()["cached_scrub_mismatches_total"] == 0 and _health(node, ref) == 200
    tree = Path(node.ctl("path", ref).stdout.strip())

    # The origin is busy, so that what stands between can be seen.
    origin.faults["m/model.safetensors"] = Fault("status", status=503)
    digest = sums["model.safetensors"]
    _flip_bits(node.data_dir / "blobs" / "sha256" / digest[:2] / digest)
    eventually(lambda: _health(node, ref) == 503)
    eventually(lambda: not tree.exists())
    (kept,) = (node.data_dir / "quarantine").iterdir()
    assert sha256(kept / "blob") != digest
    assert "found by the scrubber" in json.loads((kept / "reason.json").read_text())["reason"]
    eventually(lambda: node.metrics()["cached_quarantine_bytes"] == (kept / "blob").stat().st_size)
    assert node.metrics()["cached_scrub_mismatches_total"] == 1

    origin.faults.clear()
    eventually(lambda: _health(node, ref) == 200)
    assert {name: sha256(tree / name) for name in sums} == sums
    began = node.metrics()["cached_scrub_last_round_timestamp_seconds"]
    eventually(lambda: node.metrics()["cached_scrub_last_round_timestamp_seconds"] > began + 1)
    assert node.metrics()["cached_scrub_mismatches_total"] == 1 and _health(node, ref) == 200
