"""The process that does the work of one request at a time: resolve, fetch or verify.

Owns the process: its pipes, its end, the connections it keeps between requests. Started by the pool as
``python -m cached.fetch.worker PARENT_PID``; reads requests on stdin, answers on stdout, complains on
stderr. Ends as soon as stdin does, in the middle of whatever it does: all it leaves is resumable.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, Never, assert_never

from cached.config import TransferSettings
from cached.durable import FsyncFailed
from cached.fetch.gate import Gate
from cached.fetch.kernel import die_with_parent, stand_back
from cached.fetch.pace import RateLimit, patiently
from cached.fetch.todo import Todo
from cached.fetch.transfer import Transfer
from cached.fetch.verify import verify
from cached.fetch.wire import (
    Advanced,
    Failed,
    Fetch,
    Fetched,
    Order,
    Pace,
    Reply,
    Request,
    Resolve,
    Resolved,
    Sealed,
    Verified,
    Verify,
    Wanted,
    decode_request,
    encode,
)
from cached.model import Blob, CachedError, ErrorKind, Problem
from cached.sources import Origins


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, and what orders that come while it runs are given to."""

    request: Request
    gate: Gate | None = None
    todo: Todo | None = None

    def hear(self, order: Order) -> None:
        """Said to whatever was asked last: an order that comes too late changes nothing."""
        if self.gate is None or self.todo is None:
            return
        if isinstance(order, Pace):
            self.gate.change(order)
        else:
            self.todo.hear(order)


class Worker:
    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._out_lock = threading.Lock()
        self._origins: Origins | None = None
        self._origins_settings: TransferSettings | None = None

    def prepare(self, request: Request) -> Asked:
        """Make what orders can be given to, as they may come before the work on the request begins."""
        if not isinstance(request, Fetch):
            return Asked(request)
        return Asked(request, Gate(request.pace), Todo(lambda digest: self._say(Wanted(digest))))

    def answer(self, asked: Asked) -> bool:
        """Do what is asked and say how it went. False when this process has to end."""
        request = asked.request
        try:
            self._say(self._do(asked))
        except CachedError as error:
            self._say(Failed(error.problem))
            return not isinstance(request, Fetch)
        except FsyncFailed as error:
            self._say(Failed(_fsync_problem(error), fsync=True))
            return False
        return True

    def _do(self, asked: Asked) -> Reply:
        request = asked.request
        match request:
            case Resolve(ref=ref, settings=settings, source=about):
                origins = self._origins_for(settings)
                return Resolved(patiently(lambda: origins.resolve(ref, about), settings.attempts, time.sleep))
            case Fetch(job=job, settings=settings, source=about):
                source = self._origins_for(settings).source_for(job.revision.ref, about)
                assert asked.gate is not None and asked.todo is not None
                told = (self._sealed, self._advanced)
                return Fetched(Transfer(job, source, settings, *told, asked.gate, asked.todo).run())
            case Verify(files=files, rate_bytes_per_s=rate):
                stand_back()
                return Verified(verify(files, self._advanced, _pace(rate)))
        assert_never(request)

    def _origins_for(self, settings: TransferSettings) -> Origins:
        """The kept connections, unless they were made under other settings."""
        if self._origins is None or self._origins_settings != settings:
            if self._origins is not None:
                self._origins.close()
            self._origins = Origins(settings.connections, settings.timeout_s)
            self._origins_settings = settings
        return self._origins

    def _sealed(self, index: int, blob: Blob) -> None:
        self._say(Sealed(index, blob))

    def _advanced(self, done_bytes: int, origin_bytes: int = 0) -> None:
        self._say(Advanced(done_bytes, origin_bytes))

    def _say(self, reply: Reply) -> None:
        line = encode(reply)
        with self._out_lock:
            self._out.write(line)
            self._out.flush()


def _pace(rate_bytes_per_s: int | None) -> Callable[[int], None]:
    """To be called with the bytes of each read: waits for as long as the rate asks for."""
    limit = RateLimit(rate_bytes_per_s)
    return lambda size_bytes: time.sleep(limit.book(size_bytes, time.monotonic()))


def _fsync_problem(error: FsyncFailed) -> Problem:
    return Problem(
        ErrorKind.FAILED,
        "FSYNC_FAILED",
        str(error),
        "the disk is failing or full: see the kernel's log; what was being written is discarded",
    )


def _read_requests(worker: Worker, requests: queue.SimpleQueue[Asked]) -> None:
    """Pass requests and orders on until the pool closes the pipe or is gone; then end the process at once."""
    last: Asked | None = None
    status = 1
    try:
        for line in sys.stdin.buffer:
            said = decode_request(line)
            if isinstance(said, Order):
                if last is not None:
                    last.hear(said)
            else:
                last = worker.prepare(said)
                requests.put(last)
        status = 0
    except BaseException:  # a fault of ours: the pool shows the last line of this
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _own_stdout() -> BinaryIO:
    """The pipe to the pool, out of reach of anything that prints."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return out


def main() -> None:
    die_with_parent(int(sys.argv[1]))
    worker = Worker(_own_stdout())
    requests: queue.SimpleQueue[Asked] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(worker, requests), daemon=True).start()
    try:
        while worker.answer(requests.get()):
            pass
    except BaseException:  # a fault of ours: the pool shows the last line of this
        traceback.print_exc()
        _end_now(1)
    _end_now(0)


def _end_now(status: int) -> Never:
    """Without waiting for threads: those of a failed transfer may be at work, on what is resumable anyway."""
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
