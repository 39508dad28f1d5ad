"""Many replicas at once: ``python -m benchmarks.handoff.crowd TASK COUNT TIMES``.

Owns the barrier. Each replica is a process of its own, forked from one that has made the imports and nothing
else, so that a hundred do not need the memory of a hundred; all are let go at one moment, from which each
one's seconds count. Prints them as JSON: for each time a list.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import NoReturn

from benchmarks.handoff.replica import KINDS, Load, Task

RECORD_BYTES = 64
"""Written at once, so that nobody's record breaks another's."""
SETTLE_S = 0.05
"""From the last one's word to its wait."""


def crowd(load: Load, count: int) -> list[float]:
    """Seconds until each has its complete state dict."""
    gate, opener = os.pipe()
    results, teller = os.pipe()
    pids = [fork(load, gate, opener, teller) for _ in range(count)]
    os.close(gate)
    os.close(teller)
    there = b""
    while len(there) < count and (said := os.read(results, count)):
        there += said
    time.sleep(SETTLE_S)
    began = time.monotonic()
    os.close(opener)
    with os.fdopen(results, "rb") as file:
        ended = [float(line) for line in file]
    for pid in pids:
        os.waitpid(pid, 0)
    if len(ended) != count:
        sys.exit(f"{count - len(ended)} of {count} replicas failed")
    return [end - began for end in ended]


def fork(load: Load, gate: int, opener: int, teller: int) -> int:
    pid = os.fork()
    if pid == 0:
        os.close(opener)
        be_replica(load, gate, teller)
    return pid


def be_replica(load: Load, gate: int, teller: int) -> NoReturn:
    code = 1
    try:
        os.write(teller, b".")
        os.read(gate, 1)  # nothing is ever written: it ends when the gate opens
        state, _ = load()
        record = f"{time.monotonic():.6f}\n".encode()
        assert state and len(record) <= RECORD_BYTES
        os.write(teller, record)
        code = 0
    finally:
        os._exit(code)


def main() -> None:
    task, count, times = Task(**json.loads(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
    import torch  # noqa: F401

    load = KINDS[task.kind](task)
    print(json.dumps([crowd(load, count) for _ in range(times)]))


if __name__ == "__main__":
    main()
