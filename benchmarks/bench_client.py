"""The users that ``benchmarks.bench`` starts as processes of their own; they print seconds, one a line.

``prefetch URL COUNT`` asks the daemon for the models ``URL0/``, ``URL1/``, … and waits for all of them.
``acquire REF DEVICE TIMES`` acquires and closes, again and again.
"""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import grpc

import cached
from cached.v1 import operator_pb2, operator_pb2_grpc

AT_ONCE = 32
TIMEOUT_S = 500.0


def prefetch(url: str, count: int) -> None:
    with grpc.insecure_channel(f"unix:{os.environ['CACHED_RUN_DIR']}/cached.sock") as channel:
        stub = operator_pb2_grpc.OperatorStub(channel)

        def one(number: int) -> None:
            request = operator_pb2.PrefetchRequest(ref=f"{url}{number}/", wait=True)
            *_, last = stub.Prefetch(request, timeout=TIMEOUT_S)
            assert last.WhichOneof("event") == "done" and last.done.state == "verified", last

        began = time.monotonic()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(one, range(count)))
        print(time.monotonic() - began)


def acquire(ref: str, device: str, times: int) -> None:
    for _ in range(times):
        began = time.monotonic()
        with cached.acquire(ref, on=device, timeout_s=TIMEOUT_S):
            print(time.monotonic() - began)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["prefetch", url, count]:
            prefetch(url, int(count))
        case ["acquire", ref, device, times]:
            acquire(ref, device, int(times))
        case _:
            sys.exit(__doc__)
