"""A daemon that answers as it is told to: real gRPC on real sockets, for the tests of the commands."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from cached.v1 import model_cache_pb2_grpc as pb_grpc
from cached.v1 import operator_pb2_grpc as op_grpc


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error as the daemon tells it."""

    code: str
    reason: str
    message: str
    hint: str = ""
    retry_after_s: int | None = None

    def abort(self, context: grpc.ServicerContext) -> None:
        details = [
            error_details_pb2.ErrorInfo(reason=self.reason, domain="cached"),
            error_details_pb2.LocalizedMessage(locale="en", message=self.hint),
        ]
        if self.retry_after_s is not None:
            details.append(error_details_pb2.RetryInfo(retry_delay=Duration(seconds=self.retry_after_s)))
        status = status_pb2.Status(code=code_pb2.Code.Value(self.code), message=self.message)
        for detail in details:
            status.details.add().Pack(detail)
        context.abort_with_status(rpc_status.to_status(status))


@dataclass
class Daemon:
    """``answers`` maps a call's name to its answer, a Refusal, or (streams) a list of steps.

    A step is an event, a Refusal, or something to call in between, such as an Event's ``wait``.
    ``asked`` holds every call and its request, in order.
    """

    run_dir: Path
    answers: dict[str, Any] = field(default_factory=dict)
    asked: list[tuple[str, Any]] = field(default_factory=list)
    gone: threading.Event = field(default_factory=threading.Event)
    _servers: list[grpc.Server] = field(default_factory=list)

    @property
    def operators(self) -> Path:
        return self.run_dir / "cached.sock"

    @property
    def replicas(self) -> Path:
        return self.run_dir / "replicas" / "cached.sock"

    def __enter__(self) -> Daemon:
        self.replicas.parent.mkdir(parents=True)
        for path, adders in ((self.operators, (_add_models, _add_operator)), (self.replicas, (_add_models,))):
            server = grpc.server(ThreadPoolExecutor(4))
            for add in adders:
                add(server, self)
            server.add_insecure_port(f"unix:{path}")
            server.start()
            self._servers.append(server)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End as a killed daemon does, as far as its callers can see."""
        ended = [server.stop(grace=None) for server in self._servers]
        # Only now, so that whoever waits in a call finds it broken off and cannot end it well.
        self.gone.set()
        for one in ended:
            one.wait()
        self._servers.clear()

    def last(self, call: str) -> Any:
        """The latest request of this call."""
        return next(request for name, request in reversed(self.asked) if name == call)


class _Servicer:
    """Both services; every method answers by its name."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def one(self, name: str) -> Callable[[Any, grpc.ServicerContext], Any]:
        def answer(request: Any, context: grpc.ServicerContext) -> Any:
            self._daemon.asked.append((name, request))
            told = self._daemon.answers[name]
            if isinstance(told, Refusal):
                told.abort(context)
            return told() if callable(told) else told

        return answer

    def many(self, name: str) -> Callable[[Any, grpc.ServicerContext], Iterator[Any]]:
        def answer(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            self._daemon.asked.append((name, request))
            told = self._daemon.answers[name]
            for step in told if isinstance(told, list) else [told]:
                if isinstance(step, Refusal):
                    step.abort(context)
                elif callable(step):
                    step()
                else:
                    yield step

        return answer


def _add_models(server: grpc.Server, daemon: Daemon) -> None:
    answers = _Servicer(daemon)
    servicer = pb_grpc.ModelCacheServicer()
    servicer.Acquire = answers.many("Acquire")
    servicer.Get = answers.one("Get")
    servicer.List = answers.one("List")
    pb_grpc.add_ModelCacheServicer_to_server(servicer, server)


def _add_operator(server: grpc.Server, daemon: Daemon) -> None:
    answers = _Servicer(daemon)
    servicer = op_grpc.OperatorServicer()
    for name in ("Prefetch", "Pin", "Swap", "Verify"):
        setattr(servicer, name, answers.many(name))
    for name in ("Unpin", "Evict", "Status"):
        setattr(servicer, name, answers.one(name))
    op_grpc.add_OperatorServicer_to_server(servicer, server)
