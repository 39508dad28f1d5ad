"""All tests, in two processes beside each other: the end-to-end tests wait most of the time.

One has most of the end-to-end tests; the other those of units, and then the rest. What the second one says is
kept in a file, and shown once both are done. Ends with 1 where either failed.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import BinaryIO

PYTEST = (sys.executable, "-m", "pytest")
REST = [f"tests/e2e/test_{name}.py" for name in ("sick_disk", "single_flight", "start", "watching")]
"""As many as make both processes take about as long."""


def main(log: Path) -> int:
    statuses: list[int] = []
    with log.open("wb") as out:
        second = threading.Thread(target=run_second, args=(out, statuses))
        second.start()
        statuses.append(subprocess.call([*PYTEST, "tests/e2e", *(f"--ignore={path}" for path in REST)]))
        second.join()
    sys.stdout.write(log.read_text(errors="replace"))
    return int(any(statuses))


def run_second(out: BinaryIO, statuses: list[int]) -> None:
    for tests in (["--ignore=tests/e2e"], REST):
        statuses.append(subprocess.call([*PYTEST, *tests], stdout=out, stderr=subprocess.STDOUT))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
