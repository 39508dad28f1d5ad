"""A model of the Hub, by the real daemon, from a stand-in that the real client downloads from as well."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest
from hubkit import GOOD, Hub
from kit import NodeKit, sha256, write_model

from benchmarks.demo.models import MINILM_PACKAGE, listed_files

REF = "hf://org/name"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"


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


# A replica without a network, that sees the cache through a read-only mount and has no other place to write
# to. It is asked as whoever mounted it, and then, where that was root, as somebody else: by then all that is
# imported is imported, for the interpreter need not be readable for others.
OFFLINE = """
import os, sys
from pathlib import Path
import torch
from huggingface_hub import hf_hub_download, scan_cache_dir, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoModel, AutoTokenizer

repo, commit, source = sys.argv[1:4]
cache = Path(os.environ["HF_HUB_CACHE"])
snapshot = cache / ("models--" + repo.replace("/", "--")) / "snapshots" / commit
assert os.statvfs(cache).f_flag & os.ST_RDONLY

def embedded(name, **more):
    words = AutoTokenizer.from_pretrained(name, **more)("The weights are here.", return_tensors="pt")
    with torch.inference_mode():
        return AutoModel.from_pretrained(name, **more)(**words).last_hidden_state

def ask(expected):
    for revision in (None, "main", "v1", commit):
        assert Path(snapshot_download(repo, revision=revision)) == snapshot
        assert Path(snapshot_download(repo, revision=revision, local_files_only=True)) == snapshot
        for name in ("config.json", "1_Pooling/config.json"):
            assert Path(hf_hub_download(repo, name, revision=revision)) == snapshot / name
            assert Path(try_to_load_from_cache(repo, name, revision=revision)) == snapshot / name
    try:
        raise AssertionError(hf_hub_download(repo, "pytorch_model.bin"))
    except LocalEntryNotFoundError:
        pass
    found = scan_cache_dir()
    assert found.warnings == []
    (one,) = found.repos
    assert one.repo_id == repo and one.refs.keys() == {"main", "v1"}
    assert torch.equal(embedded(repo), expected)
    assert torch.equal(embedded(repo, revision="v1"), expected)

expected = embedded(source)
assert expected.shape[-1] == 384
ask(expected)
if sys.argv[4] == "root":
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    ask(expected)
print("read")
"""
MOUNTED = 'mount --bind "$1" "$2" && mount -o remount,bind,ro "$2" && shift 2 && exec "$@"'


def read_offline(hub_dir: Path, *arguments: str) -> str:
    """What a replica says that has nothing but this directory."""
    is_root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        command = ["unshare", "-mn" if is_root else "-Urmn", "sh", "-c", MOUNTED, "sh", str(hub_dir), place]
        command += [sys.executable, "-c", OFFLINE, *arguments, "root" if is_root else "user"]
        env = {**os.environ, "HF_HUB_CACHE": place, "HF_HUB_OFFLINE": "1", "HF_HOME": place, "HOME": place}
        done = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.strip()


def test_transformers_reads_the_node_as_its_cache_without_a_network(hub_node: NodeKit, hub: Hub) -> None:
    """The real all-MiniLM-L6-v2, by the real libraries."""
    hub.page_entries = 1000  # it hashes all of them for each page
    repo = hub.repo(MINILM)
    with resources.as_file(resources.files(MINILM_PACKAGE) / "model") as source:
        files = {name: (source / name).read_bytes() for name in listed_files(source)}
        commit = repo.commit({**files, "pytorch_model.bin": b"pickled"})
        repo.names["v1"] = commit
        for revision in ("", "@v1"):
            hub_node.ctl("prefetch", f"hf://{MINILM}{revision}", "--wait")
        view = hub_node.data_dir / "hub"
        assert read_offline(view, MINILM, commit, str(source)) == "read"
    hub_node.ctl("evict", f"hf://{MINILM}")
    assert list(view.iterdir()) == []
    assert [path for path in (hub_node.data_dir / "blobs").rglob("*") if path.is_file()] == []
