"""The parts of ``benchmarks.handoff`` that nobody would miss until its figures were wrong."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks.handoff.models import Model, bring_in, cached_share, experts, shards_of, write_model
from benchmarks.handoff.replica import checksum, touch
from benchmarks.handoff.scaling import BARE, growth_aims
from benchmarks.handoff.stage import Replica


def test_a_model_is_what_its_index_says(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", experts(30, 600_000))
    (shard,) = model.folder.glob("*.safetensors")
    state = load_file(shard)
    index = json.loads((model.folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == dict.fromkeys(state, shard.name) and len(state) == model.tensors == 30
    sums = dict(line.split("  ")[::-1] for line in (model.folder / "SHA256SUMS").read_text().splitlines())
    assert sums[shard.name] == hashlib.sha256(shard.read_bytes()).hexdigest()
    touch(state)
    before = checksum(state)
    next(iter(state.values())).view(-1)[3] = 7.0
    assert checksum(state) != before


def test_shards_are_cut_between_tensors() -> None:
    large = [(f"t{n}", (10_000, 30_000)) for n in range(7)]
    assert [len(shard) for shard in shards_of(large)] == [3, 3, 1]


def test_it_is_seen_what_of_a_file_is_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(2**20))
    bring_in([path])
    fd = os.open(path, os.O_RDWR)
    assert cached_share(fd) == 1.0
    os.ftruncate(fd, 4 * 2**20)  # with pages that nobody has read
    assert cached_share(fd) == pytest.approx(0.25)
    os.close(fd)


def test_the_growth_is_told_from_the_base() -> None:
    def model(name: str, tensors: int, size_bytes: int) -> Model:
        return Model(name, Path("/m"), tensors, size_bytes)

    models = [model("a", 100, 64), model("b", 1000, 64), model("c", 10_000, 64), model("heavy", 1000, 640)]
    took = {
        m.name: [Replica({}, dict.fromkeys(("exchange", "complete"), 5e-3 + 2e-5 * m.tensors), "")]
        for m in models
    }
    aims = [*growth_aims(models, {**took, BARE: []})]
    assert [round(aim.value, 6) for aim in aims] == [20.0, 5.0, 1.0] * 2
    assert [aim.met for aim in aims] == [False, True, True] * 2
