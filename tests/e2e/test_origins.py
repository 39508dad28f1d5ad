"""Origins, and what is refused: each refusal names the file and both values, and leaves nothing to serve."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path

import pytest
from kit import NodeKit, eventually, sha256, write_model, write_sums

from benchmarks.origin import Fault, Origin


def test_a_folder_without_sums_is_unattested_and_one_with_sums_is_not(node: NodeKit, tmp_path: Path) -> None:
    write_model(tmp_path / "bare", sums=False)
    write_model(tmp_path / "sealed", seed=1)
    for name, attested in (("bare", False), ("sealed", True)):
        ref = f"file://{tmp_path / name}/"
        node.ctl("prefetch", ref, "--wait")
        row = node.row(ref)
        assert (row["state"], row["attested"]) == ("verified", attested)
    assert "unattested" in node.ctl("ls").stdout


def test_a_folder_is_copied_and_never_linked(node: NodeKit, tmp_path: Path) -> None:
    sums = write_model(tmp_path / "m")
    ref = f"file://{tmp_path / 'm'}/"
    node.ctl("prefetch", ref, "--wait")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"gone")
    path = Path(node.ctl("path", ref).stdout.strip())
    assert sha256(path / "model.safetensors") == sums["model.safetensors"]


def test_a_wrong_digest_is_refused_with_both_values(node: NodeKit, origin: Origin, tmp_path: Path) -> None:
    sums = write_model(tmp_path / "origin" / "m", 2 << 20)
    origin.faults["m/model.safetensors"] = Fault("corrupt", at_bytes=1_000_000, times=None)
    data = bytearray((tmp_path / "origin" / "m" / "model.safetensors").read_bytes())
    data[1_000_000] ^= 0xFF
    ref = f"{origin.url}m/"
    refused = node.ctl("prefetch", ref, "--wait", code=4)
    assert "model.safetensors" in refused.stderr
    assert sums["model.safetensors"] in refused.stderr
    assert hashlib.sha256(data).hexdigest() in refused.stderr
    _nothing_served(node, ref)
    # Mended at the origin, the same command works.
    origin.faults.clear()
    node.ctl("prefetch", ref, "--wait")
    assert node.row(ref)["state"] == "verified"


def test_a_missing_file_is_refused_by_name(node: NodeKit, origin: Origin, tmp_path: Path) -> None:
    write_model(tmp_path / "origin" / "m")
    (tmp_path / "origin" / "m" / "config.json").unlink()
    ref = f"{origin.url}m/"
    assert "config.json" in node.ctl("prefetch", ref, "--wait", code=3).stderr
    _nothing_served(node, ref)


def test_a_short_file_is_refused_with_both_sizes(node: NodeKit, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    write_model(folder, 2 << 20)
    whole = (folder / "model.safetensors").stat().st_size
    os.truncate(folder / "model.safetensors", whole - 4096)
    ref = f"file://{folder}/"
    refused = node.ctl("prefetch", ref, "--wait", code=4)
    assert "model.safetensors" in refused.stderr
    _nothing_served(node, ref)


def test_an_answer_that_ends_too_early_is_an_error_that_names_the_file(
    node: NodeKit, origin: Origin, tmp_path: Path
) -> None:
    # Each of the five attempts goes on where the last one was cut: more than five times this is needed.
    write_model(tmp_path / "origin" / "m", 2 << 20)
    origin.faults["m/model.safetensors"] = Fault("truncate", at_bytes=100_000, times=None)
    ref = f"{origin.url}m/"
    failed = node.ctl("prefetch", ref, "--wait", code=None, timeout_s=120)
    assert failed.returncode in (1, 4) and "model.safetensors" in failed.stderr
    _nothing_served(node, ref)


@pytest.mark.parametrize(
    ("header", "names"),
    [
        ({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 15]}}, ["w", "15", "16"]),
        ({"w": {"dtype": "F32", "shape": [400], "data_offsets": [0, 1600]}}, ["w"]),
        ({"w": {"dtype": "WAT", "shape": [4], "data_offsets": [0, 16]}}, ["w", "WAT"]),
    ],
)
def test_an_invalid_safetensors_header_is_refused(
    node: NodeKit, tmp_path: Path, header: dict[str, object], names: list[str]
) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    text = json.dumps(header).encode()
    (folder / "bad.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 16)
    write_sums(folder)
    ref = f"file://{folder}/"
    refused = node.ctl("prefetch", ref, "--wait", code=4)
    for name in ["bad.safetensors", *names]:
        assert name in refused.stderr, refused.stderr
    _nothing_served(node, ref)


@pytest.mark.parametrize("name", ["../escape", "/etc/escape", "a/../../escape"])
def test_a_name_that_leaves_its_folder_is_refused(
    node: NodeKit, origin: Origin, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "origin" / "m"
    write_model(folder)
    with (folder / "SHA256SUMS").open("a") as sums:
        sums.write(f"{'0' * 64}  {name}\n")
    ref = f"{origin.url}m/"
    refused = node.ctl("prefetch", ref, "--wait", code=2)
    assert name in refused.stderr
    assert not list(tmp_path.rglob("escape"))
    _nothing_served(node, ref)


def test_an_origin_without_sums_is_refused_with_a_hint(node: NodeKit, origin: Origin, tmp_path: Path) -> None:
    write_model(tmp_path / "origin" / "m", sums=False)
    refused = node.ctl("prefetch", f"{origin.url}m/", "--wait", code=3)
    assert "SHA256SUMS" in refused.stderr and "hint:" in refused.stderr


def test_an_origin_that_is_away_is_said_to_be_away(node: NodeKit, origin: Origin, tmp_path: Path) -> None:
    url = origin.url
    origin.close()
    failed = node.ctl("prefetch", f"{url}m/", "--wait", code=1, timeout_s=120)
    assert "127.0.0.1" in failed.stderr and "hint:" in failed.stderr


def test_1000_tiny_models_from_one_origin(node: NodeKit, origin: Origin, tmp_path: Path) -> None:
    refs = []
    for number in range(1000):
        write_model(tmp_path / "origin" / f"m{number}", 64, seed=number)
        refs.append(f"{origin.url}m{number}/")
    code = (
        "import sys\n"
        "from cached.client.rpc import connect, resolve_address\n"
        "from cached.v1 import operator_pb2 as op, operator_pb2_grpc as rpc\n"
        "with connect(resolve_address(operator=True)) as channel:\n"
        "    stub = rpc.OperatorStub(channel)\n"
        "    for ref in sys.stdin.read().split():\n"
        "        list(stub.Prefetch(op.PrefetchRequest(ref=ref)))\n"
        "print('asked')\n"
    )
    asker = node.replica(code)
    out, err = asker.communicate("\n".join(refs), timeout=60)
    assert out.strip() == "asked", err
    eventually(lambda: node.metrics()['cached_transfers_total{outcome="done"}'] == 1000, within_s=120)
    eventually(lambda: not any(row["claims"] for row in node.rows()))
    assert {row["state"] for row in node.rows()} == {"verified"}


def _nothing_served(node: NodeKit, ref: str) -> None:
    """Neither an artifact nor a tree is there, and an acquire is refused as well."""
    assert list((node.data_dir / "artifacts").iterdir()) == []
    assert list((node.data_dir / "trees").iterdir()) == []
    assert node.row(ref).get("state", "absent") != "verified"
    assert node.ctl("path", ref, code=None, timeout_s=120).returncode not in (0, 6, 8)
