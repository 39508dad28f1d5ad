"""The round trip of an acquire, beside that of a bare call: idle, and while the node fetches.

Owns the bare server and the two clients, each a process of its own, and the cap of the origin. The *kept*
client has its channels open and is grpc.aio's; the *fresh* one is the public client, which opens a channel
for every acquire, and so does its bare call. Within a client the calls take turns, so that both see the same
machine.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import grpc
import grpc.aio
from rich.table import Table

from benchmarks.demo.processes import DemoError, Process, start
from benchmarks.handoff.models import Model, experts, write_model
from benchmarks.handoff.scaling import percentile
from benchmarks.handoff.stage import ROOT, START_S, Stage, command, wait_for_path
from benchmarks.peers.figures import Aim
from benchmarks.peers.measuring import cpu_s

TO_BARE = 3.0
TO_IDLE = 2.0
METHOD = "/bench.Bare/Call"
CALIBRATE_MBIT = 4000
WARM_UP = 20
SETTLE_S = 1.5
"""What a client takes to start, and a fetch to get going."""
KINDS = ("kept", "fresh")
DEVICES = ("disk", "host")

Trips = Mapping[str, Sequence[float]]
"""Seconds of every round trip: ``bare``, and one for each device."""


# --- in processes of their own ----------------------------------------------------------------


async def serve(path: str) -> None:
    """Answer what comes with what came."""
    server = grpc.aio.server()

    async def answer(request: bytes, context: object) -> bytes:
        return request

    handlers = {"Call": grpc.unary_unary_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("bench.Bare", handlers)])
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    await server.wait_for_termination()


async def kept(path: str, run_dir: Path, ref: str, seconds: float) -> Trips:
    from cached.client import granting, handoff
    from cached.client.devices import Wish
    from cached.v1.model_cache_pb2_grpc import ModelCacheStub

    replicas = run_dir / "replicas"
    async with (
        grpc.aio.insecure_channel(f"unix:{path}") as bare,
        grpc.aio.insecure_channel(f"unix:{replicas / 'cached.sock'}") as channel,
    ):
        call, stub = bare.unary_unary(METHOD), ModelCacheStub(channel)

        async def acquire(device: str) -> None:
            request = granting.make_request(ref, Wish(device), False, os.environ)
            token = ""
            async for event in stub.Acquire(request, timeout=START_S):
                token = event.grant.token or token
            handoff.redeem(replicas / "handoff.sock", token, START_S).close()

        trips: dict[str, list[float]] = {"bare": [], **{device: [] for device in DEVICES}}
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            began = time.monotonic()
            await call(ref.encode())
            trips["bare"].append(time.monotonic() - began)
            for device in DEVICES:
                began = time.monotonic()
                await acquire(device)
                trips[device].append(time.monotonic() - began)
        return trips


def fresh(path: str, run_dir: Path, ref: str, seconds: float) -> Trips:
    import cached

    def bare() -> None:
        with grpc.insecure_channel(f"unix:{path}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
            channel.unary_unary(METHOD)(ref.encode(), timeout=START_S)

    def acquire(device: str) -> Callable[[], None]:
        return lambda: cached.acquire(ref, on=device, run_dir=run_dir, timeout_s=START_S).close()

    ways = {"bare": bare, **{device: acquire(device) for device in DEVICES}}
    trips: dict[str, list[float]] = {name: [] for name in ways}
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for name, way in ways.items():
            began = time.monotonic()
            way()
            trips[name].append(time.monotonic() - began)
    return trips


# --- the measurement ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Found:
    """By the client's kind. ``rate_mbit``: the origin's cap; ``beside``: whether the fetches outlasted the
    clients, 1 where they did."""

    idle: Mapping[str, Trips]
    busy: Mapping[str, Trips]
    rate_mbit: float
    beside: float


@dataclass(slots=True)
class Trial:
    stage: Stage
    daemon: Process
    model: Model
    seconds: float
    calibrate_bytes: int

    def measure(self) -> Found:
        with self.bare() as path:
            idle = {kind: self.client(path, kind) for kind in KINDS}
            rate_mbit = self.one_core_mbit()
            size_bytes = int(rate_mbit * 1e6 / 8 * (self.seconds + 2 * SETTLE_S))
            busy, shares = {}, []
            for kind in KINDS:
                with self.fetching(kind, size_bytes, rate_mbit) as fetch:
                    busy[kind] = self.client(path, kind)
                    shares.append(float(fetch.poll() is None))
        return Found(idle, busy, rate_mbit, min(shares))

    @contextmanager
    def bare(self) -> Iterator[str]:
        path = self.stage.places.run / "bare.sock"
        argv = [sys.executable, "-P", "-m", "benchmarks.handoff.round_trips", "serve", str(path)]
        process = start("the bare server", argv, self.stage.places.work / "bare.log", self.stage.env, ROOT)
        wait_for_path(process, path)
        yield str(path)
        process.stop()

    def client(self, path: str, kind: str) -> Trips:
        argv = [kind, path, str(self.stage.run_dir), self.model.ref, str(self.seconds)]
        trips: Trips = json.loads(self.stage.python("benchmarks.handoff.round_trips", *argv))
        return {name: took[WARM_UP:] for name, took in trips.items()}

    def one_core_mbit(self) -> float:
        """What the daemon and the origin fetch with as much CPU time as one core has."""
        with self.origin("calibration", self.calibrate_bytes, CALIBRATE_MBIT) as (origin, ref):
            pids = (self.daemon.popen.pid, origin.popen.pid)
            before_s = cpu_s(pids)
            self.stage.fetch(ref)
            spent_s = cpu_s(pids) - before_s
            self.stage.evict(ref)
        return self.calibrate_bytes * 8 / 1e6 / max(spent_s, 0.1)

    @contextmanager
    def fetching(self, name: str, size_bytes: int, rate_mbit: float) -> Iterator[subprocess.Popen[bytes]]:
        """While this runs, the daemon fetches; as nobody's wish but an operator's."""
        with self.origin(name, size_bytes, rate_mbit) as (_, ref):
            argv = [command("cachectl"), "prefetch", ref, "--wait"]
            fetch = subprocess.Popen(argv, env=self.stage.env, stdout=subprocess.DEVNULL)
            time.sleep(SETTLE_S)
            yield fetch
            if fetch.wait(300):
                raise DemoError(f"the prefetch of {ref} failed")
            self.stage.evict(ref)

    @contextmanager
    def origin(self, name: str, size_bytes: int, rate_mbit: float) -> Iterator[tuple[Process, str]]:
        work = self.stage.places.work
        write_model(work / "served" / name, experts(64, size_bytes))
        argv = [sys.executable, str(ROOT / "benchmarks" / "origin.py"), str(work / "served")]
        argv += ["--rate-mbit", f"{rate_mbit:.0f}"]
        process = start("the origin", argv, work / f"origin-{name}.log", self.stage.env, ROOT)
        url = process.wait_for(r"(http://127\.0\.0\.1:\d+/)", START_S)
        yield process, f"{url}{name}/"
        process.stop()


# --- what it comes to -----------------------------------------------------------------------


def aims_of(found: Found) -> Iterator[Aim]:
    for kind in KINDS:
        idle, busy = found.idle[kind], found.busy[kind]
        for device in DEVICES:
            ratio = median(idle[device]) / median(idle["bare"])
            yield Aim(f"acquire on {device} to a bare call, {kind} channel", ratio, TO_BARE, at_most=True)
            slower = percentile(busy[device], 99) / percentile(idle[device], 99)
            name = f"acquire on {device} beside a prefetch, {kind} channel: p99 to idle"
            yield Aim(name, slower, TO_IDLE, at_most=True)


def table_of(found: Found) -> Table:
    title = f"Round trips, ms; the prefetch's origin gives {found.rate_mbit:.0f} Mbit/s, one core's rate"
    if found.beside < 1:
        title += "; it was over BEFORE the clients were"
    table = Table("call", title=title)
    for heading in ("channel", "p50", "p99", "beside a prefetch: p50", "p99", "count"):
        table.add_column(heading, justify="right")
    for kind in KINDS:
        for name in ("bare", *DEVICES):
            idle, busy = found.idle[kind][name], found.busy[kind][name]
            values = (median(idle), percentile(idle, 99), median(busy), percentile(busy, 99))
            words = "bare unary call" if name == "bare" else f"acquire on {name}"
            cells = [f"{1000 * value:.2f}" for value in values]
            table.add_row(words, kind, *cells, f"{len(idle)}/{len(busy)}")
    return table


def main() -> None:
    match sys.argv[1:]:
        case ["serve", path]:
            asyncio.run(serve(path))
        case ["kept", path, run_dir, ref, seconds]:
            print(json.dumps(asyncio.run(kept(path, Path(run_dir), ref, float(seconds)))))
        case ["fresh", path, run_dir, ref, seconds]:
            print(json.dumps(fresh(path, Path(run_dir), ref, float(seconds))))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
