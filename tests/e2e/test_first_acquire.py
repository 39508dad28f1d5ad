"""The whole way, once: an origin, a node's disk and memory, a running replica."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from kit import NodeKit, eventually, sha256, write_model

from benchmarks.origin import Origin

LOAD = """
import sys, torch, cached
ref, on, expected = sys.argv[1:]
net = torch.nn.Module()
with cached.acquire(ref, on=on, timeout_s=60) as model:
    assert model.device == on, model.device
    tensors = dict(model.tensors)
    net.first = torch.nn.Parameter(torch.empty(tensors["first"].shape, device="meta"))
    net.second = torch.nn.Parameter(torch.empty(tensors["second"].shape, device="meta"))
    net.load_state_dict(model.tensors, assign=True)
    from safetensors.torch import load_file
    plain = load_file(expected)
    for name, tensor in plain.items():
        assert torch.equal(tensor.view(torch.int32), net.state_dict()[name].view(torch.int32)), name
    print("loaded", flush=True)
    with torch.no_grad():
        net.first.fill_(7.0)
    print("written", flush=True)
    sys.stdin.readline()
assert net.first[0] == 7.0
print("closed", flush=True)
"""


@pytest.mark.parametrize("on", ["disk", "host"])
def test_a_model_goes_from_an_http_origin_into_two_replicas(
    node: NodeKit, origin: Origin, tmp_path: Path, on: str
) -> None:
    folder = tmp_path / "origin" / "m"
    sums = write_model(folder, 40 << 20)
    ref = f"{origin.url}m/"

    node.ctl("pin", ref, "--on", on, "--wait")
    row = node.row(ref)
    assert row["state"] == "verified" and row["attested"] is True
    assert on in row["devices"]
    path = Path(node.ctl("path", ref).stdout.strip())
    assert {name: sha256(path / name) for name in sums} == sums

    expected = str(folder / "model.safetensors")
    replicas = [node.replica(LOAD, ref, on, expected) for _ in range(2)]
    for replica in replicas:
        _expect(replica, "loaded", "written")
    # Both wrote into their tensors: neither the file nor the other one may have seen it.
    assert sha256(path / "model.safetensors") == sums["model.safetensors"]
    third = node.replica(LOAD, ref, on, expected)
    _expect(third, "loaded", "written")
    for replica in [*replicas, third]:
        assert replica.stdin is not None
        replica.stdin.close()
        _expect(replica, "closed")
    eventually(lambda: not [c for c in node.row(ref)["claims"] if c["kind"] == "lease"])


def _expect(replica: subprocess.Popen[str], *lines: str) -> None:
    assert replica.stdout is not None and replica.stderr is not None
    for line in lines:
        got = replica.stdout.readline().strip()
        assert got == line, f"{got!r} came where {line!r} was expected; {replica.stderr.read()}"


def test_the_json_of_ls_is_the_documented_one(node: NodeKit, origin: Origin, tmp_path: Path) -> None:
    write_model(tmp_path / "origin" / "m")
    node.ctl("prefetch", f"{origin.url}m/", "--wait")
    rows = json.loads(node.ctl("ls", "-o", "json").stdout)
    assert [set(row) for row in rows] == [{"ref", "id", "state", "attested", "bytes", "devices", "claims"}]
    assert rows[0]["id"].startswith("sha256:") and rows[0]["claims"] == []
