"""What the handoff grows with: tensors, bytes, replicas at once.

Owns the fit and the aims about it. Everything stands in host memory before anything is counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from statistics import linear_regression, median, quantiles

from rich.table import Table

from benchmarks.handoff.compare import step_ms
from benchmarks.handoff.models import Model
from benchmarks.handoff.replica import Task
from benchmarks.handoff.stage import Replica, Stage
from benchmarks.peers.figures import Aim

TENSOR_US = 15.0
BASE_MS = 10.0
BYTES_RATIO = 1.25
"""Exchanges of as many tensors in more bytes: what is above 1 is to be noise."""
BARE = "a bare first call"
STEPS = {"exchange": "exchange", "complete": "complete state dict"}

Runs = Mapping[str, Sequence[Replica]]
"""By the model's name."""


def grow(stage: Stage, models: Sequence[Model], warm_up: int, count: int) -> Runs:
    """``count`` fresh processes for each, and as many that make one bare call, in turn."""
    for model in models:
        stage.stand(model.ref)
    tasks = {model.name: Task("ours-host", model.ref, "", touch=False) for model in models}
    tasks[BARE] = Task("bare", "", str(stage.run_dir), touch=False)
    runs: dict[str, list[Replica]] = {name: [] for name in tasks}
    for number in range(warm_up + count):
        for name, task in tasks.items():
            done = stage.replica(task, {}, ask_sum=False)
            if number >= warm_up:
                runs[name].append(done)
    return runs


def growth_aims(models: Sequence[Model], runs: Runs) -> Iterator[Aim]:
    """``models``: the same bytes in more and more tensors, and at last the middle one's tensors in more."""
    *same, heavy = models
    for step, name in STEPS.items():
        took = [step_ms(runs[model.name], step) for model in same]
        slope, base = linear_regression([model.tensors for model in same], took)
        yield Aim(f"{name}: each tensor", 1000 * slope, TENSOR_US, "µs", at_most=True)
        yield Aim(f"{name}: without tensors", base, BASE_MS, "ms", at_most=True)
        light = next(model for model in same if model.tensors == heavy.tensors)
        ratio = step_ms(runs[heavy.name], step) / step_ms(runs[light.name], step)
        times = heavy.size_bytes / light.size_bytes
        yield Aim(f"{name}: with {times:.0f} times the bytes", ratio, BYTES_RATIO, at_most=True)


def growth_table(models: Sequence[Model], runs: Runs) -> Table:
    table = Table("model", title="What the exchange grows with, ms (median), in host memory")
    for heading in ("tensors", "MB", *STEPS.values()):
        table.add_column(heading, justify="right")
    for model in models:
        took = [f"{step_ms(runs[model.name], step):.1f}" for step in STEPS]
        table.add_row(model.name, f"{model.tensors:,}", f"{model.size_bytes / 1e6:.0f}", *took)
    table.add_row(BARE, "", "", f"{step_ms(runs[BARE], 'complete'):.1f}", "")
    return table


# --- many at once ---------------------------------------------------------------------------


def crowds(stage: Stage, models: Sequence[tuple[Model, str]], sizes: Sequence[int], times: int) -> Table:
    """p50 and p99 of all replicas' seconds, over several crowds of each size."""
    table = Table(
        "model", title="Replicas at once, ms until the state dict is complete, from the same moment"
    )
    for heading in ("by", "at once", "p50", "p99"):
        table.add_column(heading, justify="right")
    for model, tree in models:
        stage.stand(model.ref)
        for kind in ("ours-host", "safetensors"):
            for size in sizes:
                took = crowd(stage, Task(kind, model.ref, tree, touch=False), size, times)
                name = f"{model.name}, {model.size_bytes / 1e9:.2f} GB"
                by = "cached, host" if kind == "ours-host" else kind
                cells = (f"{1000 * median(took):.1f}", f"{1000 * percentile(took, 99):.1f}")
                table.add_row(name, by, str(size), *cells)
    return table


def crowd(stage: Stage, task: Task, size: int, times: int) -> list[float]:
    """The first crowd is not counted; a small one comes more often, so that there are as many to count."""
    again = max(times, min(50, 50 // size)) + 1
    said = stage.python("benchmarks.handoff.crowd", task.encode(), str(size), str(again))
    return [seconds for one in json.loads(said)[1:] for seconds in one]


def percentile(values: Sequence[float], percent: int) -> float:
    if len(values) < 2:
        return values[0]
    return quantiles(values, n=100, method="inclusive")[percent - 1]
