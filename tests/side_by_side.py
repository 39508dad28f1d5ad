"""All tests: those of units in one process, the end-to-end tests, which wait most of the time, beside them.

What the first one says is kept in a file, and shown once both are done. Ends with 1 where either failed.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def main(log: Path) -> int:
    pytest = [sys.executable, "-m", "pytest"]
    with log.open("wb") as out:
        units = subprocess.Popen([*pytest, "--ignore=tests/e2e"], stdout=out, stderr=subprocess.STDOUT)
    try:
        failed = subprocess.run([*pytest, "tests/e2e"]).returncode != 0
        failed = units.wait() != 0 or failed
    finally:
        units.kill()
        units.wait()
        sys.stdout.write(log.read_text(errors="replace"))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
