"""A model of the Hub, by the real daemon, from a stand-in that the real client downloads from as well."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hubkit import GOOD, Hub
from kit import NodeKit, sha256, write_model

REF = "hf://org/name"


def files_of(folder: Path, seed: int, size_bytes: int = 3 << 20) -> dict[str, bytes]:
    write_model(folder, size_bytes, seed, sums=False)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub() as running:
        repo = running.repo("org/name")
        repo.commit({**files_of(tmp_path / "m", 1), "pytorch_model.bin": b"pickled"})
        yield running


@pytest.fixture
def hub_node(cold_node: NodeKit, hub: Hub) -> NodeKit:
    """A node whose [[source]] table names the stand-in, and a token by reference."""
    token = cold_node.root / "token"
    token.write_text(GOOD)
    config = cold_node.root / "cached.toml"
    config.write_text(
        '[[source]]\nprefix = "hf://"\nrequire_digest = true\n'
        f'endpoint = "{hub.url}"\ntoken_file = "{token}"\n'
    )
    cold_node.serve("--config", str(config))
    return cold_node


def test_a_model_of_the_hub_is_prefetched_proven_and_followed(
    hub_node: NodeKit, hub: Hub, tmp_path: Path
) -> None:
    repo = hub.repo("org/name")
    repo.gated = True
    hub_node.ctl("prefetch", REF, "--wait")
    row = hub_node.row(REF)
    assert (row["state"], row["attested"]) == ("verified", True)
    path = Path(hub_node.ctl("path", REF).stdout.strip())
    assert sorted(file.name for file in path.iterdir()) == ["config.json", "model.safetensors"]
    assert sha256(path / "model.safetensors") == sha256(tmp_path / "m" / "model.safetensors")
    assert {asked.token for asked in hub.asked if asked.where == "cdn"} == {""}
    # The branch moves: only what changed is asked for.
    hub.asked.clear()
    model = (tmp_path / "m" / "model.safetensors").read_bytes()
    repo.commit({"config.json": json.dumps({"seed": 2}).encode(), "model.safetensors": model})
    hub_node.ctl("prefetch", REF, "--wait")
    assert hub_node.row(REF)["id"] != row["id"]
    moved = Path(hub_node.ctl("path", REF).stdout.strip())
    assert json.loads((moved / "config.json").read_text()) == {"seed": 2}
    assert hub.count("cdn") == 0
    # What the token is does not get into the log.
    assert GOOD not in hub_node.log()


def test_refusals_of_the_hub_reach_who_asked(hub_node: NodeKit, hub: Hub) -> None:
    missing = hub_node.ctl("prefetch", "hf://org/nothing", "--wait", code=3)
    assert "org/nothing" in missing.stderr and "hint:" in missing.stderr
    hub.repo("org/pickled").commit({"pytorch_model.bin": b"pickled"})
    assert "pytorch_model.bin" in hub_node.ctl("prefetch", "hf://org/pickled", "--wait", code=7).stderr
    hub.wrong["config.json"] = b"{}"
    hub.repo("org/wrong").commit({"config.json": b"[]"})
    assert "config.json" in hub_node.ctl("prefetch", "hf://org/wrong", "--wait", code=4).stderr
    unknown = hub_node.ctl("prefetch", "nonsense://x/y", "--wait", code=2)
    assert "hf, http, https" in unknown.stderr
