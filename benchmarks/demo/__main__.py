"""``python -m benchmarks.demo``: the command line, and the supervisor around the show."""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

from rich.console import Console

from benchmarks.demo.processes import DemoError, supervise
from benchmarks.demo.show import ROOT, Options, perform


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1,000,000")
    return value


def parse(argv: list[str]) -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo", description="Time three starts of a server."
    )
    parser.add_argument(
        "--rate-mbit", type=positive, default=1000, help="what the origin sends, Mbit/s (1000)"
    )
    parser.add_argument("--cache-dir", type=Path, default=ROOT / ".demo", help="keeps the models (.demo)")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="torch's threads (cores)"
    )
    parser.add_argument("--only", choices=("minilm", "qwen2"), help="one of the models")
    given = parser.parse_args(argv)
    return Options(given.cache_dir.absolute(), given.rate_mbit, max(1, given.threads), given.only)


def main(argv: list[str]) -> int:
    options = parse(argv)
    try:
        code = supervise(options.cache, partial(perform, options))
    except (DemoError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if code > 128:
        Console().show_cursor()  # a progress bar may have hidden it
        print("stopped: no process and no directory is left")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
