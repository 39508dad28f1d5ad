"""The commands' calls to the daemon: which socket, which deadline, and what a lost daemon means.

The only module of the commands that imports gRPC, so it is imported when a command runs and not
before. Decides nothing and prints nothing; every error that leaves it is a CachedError.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TypeVar

import grpc

from cached.cli import words
from cached.client import granting, rpc
from cached.client.devices import DISK, Wish
from cached.client.errors import UNREACHABLE, CachedError
from cached.v1 import model_cache_pb2 as pb
from cached.v1 import model_cache_pb2_grpc as pb_grpc
from cached.v1 import operator_pb2 as op
from cached.v1 import operator_pb2_grpc as op_grpc

ANSWER_S = 60.0
"""How long a call that waits for no bytes may take where --timeout says nothing."""

Report = Callable[[pb.Progress], None]
Event = TypeVar("Event", op.ClaimEvent, op.VerifyEvent, pb.AcquireEvent)


class Node:
    """One node's daemon, for the length of one command."""

    def __init__(self, channel: grpc.Channel, address: str, timeout_s: float | None) -> None:
        self._models = pb_grpc.ModelCacheStub(channel)
        self._operator = op_grpc.OperatorStub(channel)
        self._address = address
        self._where = address.removeprefix("unix:")
        # A command that waits for bytes ends when the daemon gives up, unless a limit was given.
        self._waiting_s = timeout_s
        self._answer_s = ANSWER_S if timeout_s is None else timeout_s

    def list(self) -> list[pb.Model]:
        return list(self._models.List(pb.ListRequest(), timeout=self._answer_s).models)

    def get(self, ref: str) -> pb.Model:
        return self._models.Get(pb.GetRequest(ref=ref), timeout=self._answer_s)

    def status(self) -> op.NodeStatus:
        return self._operator.Status(op.StatusRequest(), timeout=self._answer_s)

    def unpin(self, ref: str) -> int:
        """How many pins were taken off."""
        return self._operator.Unpin(op.UnpinRequest(ref=ref), timeout=self._answer_s).pins

    def evict(self, ref: str) -> int:
        """The bytes that the disk has got back."""
        return self._operator.Evict(op.EvictRequest(ref=ref), timeout=self._answer_s).freed_bytes

    def prefetch(self, ref: str, wait: bool, report: Report) -> pb.Model:
        request = op.PrefetchRequest(ref=ref, wait=wait)
        return self._outcome(self._operator.Prefetch(request, timeout=self._limit_s(wait)), report)

    def pin(
        self, ref: str, device: str, wait: bool, report: Report, copies: int, priority: int, unclaimed: bool
    ) -> pb.Model:
        request = op.PinRequest(
            ref=ref, device=device, wait=wait, copies=copies, priority=priority, unclaimed=unclaimed
        )
        return self._outcome(self._operator.Pin(request, timeout=self._limit_s(wait)), report)

    def swap(self, out: str, ref: str, device: str, wait: bool, report: Report) -> pb.Model:
        request = op.SwapRequest(out=out, ref=ref, device=device, wait=wait)
        return self._outcome(self._operator.Swap(request, timeout=self._limit_s(wait)), report)

    def verify(self, ref: str, report: Report) -> Iterator[op.Verified]:
        """One outcome after the other; of every artifact where ``ref`` is empty."""
        call = self._operator.Verify(op.VerifyRequest(ref=ref), timeout=self._waiting_s)
        for event in self._results(call, report):
            yield event.verified

    def acquire_path(self, ref: str, ttl_s: int | None, report: Report) -> pb.Grant:
        """Waits until the model is on disk; it is leased only with ``ttl_s``."""
        request = granting.make_request(ref, Wish(DISK), False, os.environ)
        request.lease = pb.LEASE_MODE_NONE if ttl_s is None else pb.LEASE_MODE_TTL
        request.ttl_s = ttl_s or 0
        # Read to its end, also past the grant: breaking a stream off would cancel it at the daemon.
        grants = [
            e.grant for e in self._results(self._models.Acquire(request, timeout=self._waiting_s), report)
        ]
        return grants[-1] if grants else self._refuse_no_result()

    def _outcome(self, events: Iterable[op.ClaimEvent], report: Report) -> pb.Model:
        done = [event.done for event in self._results(events, report)]
        return done[-1] if done else self._refuse_no_result()

    def _limit_s(self, wait: bool) -> float | None:
        return self._waiting_s if wait else self._answer_s

    def _results(self, events: Iterable[Event], report: Report) -> Iterator[Event]:
        """The events that are no progress; progress is reported."""
        heard = False
        last = pb.Progress()
        try:
            for event in events:
                heard = True
                if event.HasField("progress"):
                    last = event.progress
                    report(last)
                else:
                    yield event
        except grpc.RpcError as error:
            raise self._failure(rpc.translate(error, self._address), heard, last) from error

    def _failure(self, told: CachedError, heard: bool, last: pb.Progress) -> CachedError:
        if heard and (told.reason == UNREACHABLE or (told.code, told.reason) == ("CANCELLED", "CANCELLED")):
            return _lost(self._where)
        if heard and told.reason == "DEADLINE_EXCEEDED":
            return _late(self._waiting_s, last)
        return told

    def _refuse_no_result(self) -> NoReturn:
        raise CachedError(
            "INTERNAL",
            "NO_RESULT",
            f"the daemon at {self._where} ended its answer without a result",
            "see the daemon's log; it and this command may be of versions that do not fit together",
        )


@contextmanager
def connect(
    run_dir: Path | None, address: str | None, timeout_s: float | None, reading: bool = False
) -> Iterator[Node]:
    """The daemon that is meant. What only reads goes to the replicas' socket where it has to."""
    where = _where(run_dir, address, reading)
    with rpc.connect(where) as channel:
        yield Node(channel, where, timeout_s)


def _where(run_dir: Path | None, address: str | None, reading: bool) -> str:
    operators = rpc.resolve_address(run_dir, address, operator=True)
    if not reading or _may_open(operators):
        return operators
    replicas = rpc.resolve_address(run_dir, address, operator=False)
    # Where neither can be opened, the operators' socket is the one to be told of.
    return replicas if _may_open(replicas) else operators


def _may_open(address: str) -> bool:
    path = rpc.socket_path(address)
    return path is None or os.access(path, os.R_OK | os.W_OK)


def _lost(where: str) -> CachedError:
    return CachedError(
        "UNAVAILABLE",
        UNREACHABLE,
        f"the daemon at {where} went away while this command waited",
        "once it runs again, repeat the command: what was fetched is kept; the daemon's log says why it went",
    )


def _late(limit_s: float | None, last: pb.Progress) -> CachedError:
    return CachedError(
        "DEADLINE_EXCEEDED",
        "DEADLINE_EXCEEDED",
        f"it was not done within {limit_s or 0:g} s; it was {words.progress_line(last)}",
        "allow more time (--timeout); `cachectl show REF` says how far it is",
    )
