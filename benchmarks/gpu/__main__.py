"""``python3 -m benchmarks.gpu``: what the product does on a real GPU, from the machine's limits to what dies.

Runs from a bare checkout, with what the product needs importable. Prints JSON lines as it goes and a table at
the end. Each step has a time limit, and one that fails leaves the others alone. Exits with 1 where a step
failed. ``--fake`` tries all of it on a fake GPU, which says nothing about a real one; every line says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.demo.processes import DemoError, Places, supervise
from benchmarks.gpu.stage import ROOT, SPARE, Stage, StepFailed, Wanted
from benchmarks.gpu.steps import STEPS

LIMIT_S = 300.0
MEMORY = Path("/dev/shm")
FAKE_BYTES = 768 * 2**20
FAKE_COPY_S = 0.3
FAKE = "FAKE GPU, no device's figures"


def perform(given: argparse.Namespace, places: Places) -> int:
    """All steps. Returns the exit status."""
    stage = fake_stage(given, places) if given.fake else real_stage(given, places)
    device = stage.tell("devices", stage.uuid)
    stage.uuid = device["uuid"]
    stage.env = {**stage.env, "CUDA_VISIBLE_DEVICES": stage.uuid}
    lines: list[dict[str, Any]] = []

    def say(step: str, what: str, **figures: Any) -> None:
        mark = {"fake": FAKE} if given.fake else {}
        lines.append({"step": step, "what": what, **rounded(figures)})
        print(json.dumps({**mark, **lines[-1]}), flush=True)

    say("conditions", "device", **device)
    say("conditions", "machine", **conditions())
    failed = [name for name in given.steps if not done(name, stage, partial(say, name), given.limit)]
    print_table(lines, FAKE if given.fake else f"{device['name']}, driver {device['driver']}")
    return 1 if failed else 0


def done(name: str, stage: Stage, say: Any, limit_s: float) -> bool:
    began = time.monotonic()
    try:
        with limited(limit_s):
            STEPS[name](stage, say)
    except Exception as error:
        say("FAILED", error=f"{type(error).__name__}: {error}", step_s=time.monotonic() - began)
        return False
    say("done", step_s=time.monotonic() - began)
    return True


@contextmanager
def limited(limit_s: float) -> Iterator[None]:
    def late(*_: object) -> None:
        raise StepFailed(f"it was not done after {limit_s:g} s")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


# --- the stage ------------------------------------------------------------------------------


def real_stage(given: argparse.Namespace, places: Places) -> Stage:
    wanted = Wanted(given.gb, given.sizes, given.rounds, (10, 100), Path("/dev"))
    return Stage(places, environment(places), given.device, wanted)


def fake_stage(given: argparse.Namespace, places: Places) -> Stage:
    sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "fakegpu")]
    import gpukit

    folder = places.run / "gpus"
    folder.mkdir()
    gpus = gpukit.Gpus(folder)
    uuid = gpus.add(total_bytes=FAKE_BYTES)

    @contextmanager
    def slowly() -> Iterator[None]:
        gpus.fail("cuMemcpyHtoDAsync", sleep_s=FAKE_COPY_S)
        try:
            yield
        finally:
            gpus.heal("cuMemcpyHtoDAsync")

    wanted = Wanted(given.gb, given.sizes, given.rounds, (4, 10), gpus.dev, reserve_bytes=16 * 2**20)
    return Stage(places, gpus.env(environment(places)), uuid, wanted, slowly=slowly)


def environment(places: Places) -> dict[str, str]:
    """This checkout's code, and nothing that the caller has set for a daemon of their own."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("CACHED_") and not name.lower().endswith("_proxy")
    }
    path = [str(ROOT), os.environ.get("PYTHONPATH", ""), *uninstalled(places)]
    return kept | {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTHONUNBUFFERED": "1",
        "CACHED_RUN_DIR": str(places.run / "r"),
    }


def uninstalled(places: Places) -> list[str]:
    """The daemon tells its version as it was installed; here it may not have been."""
    try:
        metadata.version("cached")
        return []
    except metadata.PackageNotFoundError:
        folder = places.work / "site" / "cached-0.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: cached\nVersion: 0\n")
        return [str(folder.parent)]


def conditions() -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found: dict[str, Any] = {
        "cores": os.cpu_count(),
        "memory_gib": memory / 2**30,
        "load": os.getloadavg()[0],
    }
    found |= {"kernel": platform.release(), "python": platform.python_version()}
    for name in ("torch", "cuda-bindings", "safetensors"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


# --- what is said ---------------------------------------------------------------------------


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def print_table(lines: list[dict[str, Any]], title: str) -> None:
    width = max(len(line["what"]) for line in lines)
    print(f"\n{title}")
    for line in lines:
        figures = {name: value for name, value in line.items() if name not in ("step", "what")}
        words = "  ".join(f"{name} {str(value).splitlines()[-1].strip()}" for name, value in figures.items())
        print(f"{line['step']:10}  {line['what']:{width}}  {words}")


def main(argv: list[str]) -> int:
    given = arguments(argv)
    # What models are fetched from, and the fake, lie in memory where there is room: the disk has the store.
    needed = SPARE * 1e9 * max(given.gb, *given.sizes) + (FAKE_BYTES if given.fake else 0)
    if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > needed:
        tempfile.tempdir = str(MEMORY)
    try:
        return supervise(given.work, partial(perform, given))
    except (DemoError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--fake", action="store_true", help="a fake GPU, and small models")
    parser.add_argument("--device", default="0", help="the GPU's number or UUID (0)")
    parser.add_argument("--gb", type=float, help="GB of the model of most steps (10)")
    parser.add_argument("--sizes", type=floats, help="GB of those that are handed over (1,10,60)")
    parser.add_argument("--rounds", type=int, default=3, help="times that each is measured (%(default)s)")
    parser.add_argument("--steps", type=steps, default=list(STEPS), help=f"which of {','.join(STEPS)}")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for a step (%(default)g)")
    parser.add_argument("--work", type=Path, default=ROOT / ".demo", help="where the store lies; a real disk")
    given = parser.parse_args(argv)
    given.gb = given.gb or (0.15 if given.fake else 10.0)
    given.sizes = given.sizes or ((0.05, 0.15) if given.fake else (1.0, 10.0, 60.0))
    return given


def floats(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


def steps(text: str) -> list[str]:
    unknown = set(text.split(",")) - STEPS.keys()
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no {', '.join(sorted(unknown))}")
    return text.split(",")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
