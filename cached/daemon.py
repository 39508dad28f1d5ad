"""The composition root: ``cached serve``. Reads the settings, makes every part, joins them, ends them.

Owns the process: arguments, signals, sockets and the order of start and end. The only room that
constructs; decides nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cached import __version__, config, log
from cached.api import ModelCache, Operator
from cached.config import Settings
from cached.durable import Fs, RealFs
from cached.fetch import FetchPool
from cached.handoff import HandoffServer
from cached.metrics import Metrics
from cached.model import CachedError, ErrorKind, Ref, permanent
from cached.node import Node
from cached.store import Store
from cached.v1 import model_cache_pb2, model_cache_pb2_grpc, operator_pb2, operator_pb2_grpc
from cached.web import WebServer

MAX_SOCKET_PATH_BYTES = 100
"""Linux takes 107; the name under which a socket is made is a little longer than its own."""
MAX_RPCS = 4096
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
GRACE_S = 2.0
KEEP_PRELOADER_S = 1.0
PRELOADER_STOP_S = 5.0
OPEN_FILES = 65_536

_EXIT_CODES = {ErrorKind.INVALID: 2, ErrorKind.NO_ROOM: 5, ErrorKind.DENIED: 7}
"""As cachectl's, for the same kinds."""

logger = structlog.get_logger("cached")


def main() -> None:
    """The command ``cached``."""
    arguments = _parser().parse_args()
    log.configure(sys.stderr)
    try:
        settings, file = _settings(arguments), config.file_of(arguments.config, os.environ)
        asyncio.run(_serve(settings, file, arguments.http, arguments.grpc, arguments.with_preloader))
    except CachedError as error:
        print(f"error: {error.problem.message}\nhint: {error.problem.hint}", file=sys.stderr)
        sys.exit(_EXIT_CODES.get(error.problem.kind, 1))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:
        # A bug of ours, or a disk that cannot be trusted any more. The next start recovers; this one cannot.
        logger.critical("the daemon cannot go on", exc_info=True)
        sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cached", description=__doc__.split("\n\n")[0] if __doc__ else "")
    parser.add_argument("--version", action="version", version=__version__)
    serve = parser.add_subparsers(dest="command", required=True, metavar="COMMAND").add_parser(
        "serve",
        help="run the node's daemon",
        description="Run the node's daemon: fetch and prove model weights, keep them warm, hand them over.",
        epilog="example: cached serve --with-preloader --data-dir D --run-dir R --http 127.0.0.1:9470",
    )
    serve.add_argument("--config", type=Path, metavar="FILE", help="TOML file (default: $CACHED_CONFIG)")
    serve.add_argument("--data-dir", metavar="DIR", help="where weights are kept (default: /var/lib/cached)")
    serve.add_argument("--run-dir", metavar="DIR", help="sockets and leases (default: /run/cached)")
    serve.add_argument("--http", metavar="HOST:PORT", type=_address, help="serve /health and /metrics")
    serve.add_argument(
        "--grpc",
        metavar="HOST:PORT",
        type=_address,
        help="serve replicas over TCP too, without descriptors",
    )
    serve.add_argument("--with-preloader", action="store_true", help="run the preloader too, for one machine")
    return parser


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, such as 127.0.0.1:9470")
    return host.strip("[]"), int(port)


def _settings(arguments: argparse.Namespace) -> Settings:
    settings = config.load(arguments.config, os.environ)
    for name in ("data_dir", "run_dir"):
        directory = getattr(arguments, name)
        if directory:
            settings = dataclasses.replace(settings, **{name: os.path.abspath(directory)})
    return settings


# --- parts ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Sockets:
    """The sockets below one run directory."""

    run_dir: Path

    @property
    def operators(self) -> Path:
        return self.run_dir / "cached.sock"

    @property
    def replicas(self) -> Path:
        return self.run_dir / "replicas" / "cached.sock"

    @property
    def handoff(self) -> Path:
        return self.run_dir / "replicas" / "handoff.sock"

    def prepare(self, fs: Fs) -> None:
        """Make the directories, once: they are never replaced, so that mounts of them stay good."""
        longest = self.run_dir / "replicas" / "handoff.sock"
        if len(os.fsencode(longest)) > MAX_SOCKET_PATH_BYTES:
            raise permanent(
                ErrorKind.INVALID,
                "RUN_DIR_TOO_LONG",
                f"{longest} is longer than a socket's name may be",
                "choose a shorter --run-dir",
            )
        for name, mode in (("", 0o755), ("leases", 0o700), ("standby", 0o700), ("replicas", 0o755)):
            fs.make_dir(self.run_dir / name, mode)


class _View:
    """What probes may see of the node."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def started(self) -> bool:
        return self._node.ready

    def ready(self) -> bool:
        return self._node.ready

    def model(self, ref: Ref) -> tuple[bool, str]:
        try:
            view = self._node.model(ref)
        except CachedError:
            return False, "absent"
        return view.state == "verified", view.state


def _server() -> grpc.aio.Server:
    options = [("grpc.so_reuseport", 0), ("grpc.max_send_message_length", MAX_MESSAGE_BYTES)]
    return grpc.aio.server(options=options, maximum_concurrent_rpcs=MAX_RPCS)


async def _add_common(server: grpc.aio.Server, services: list[str]) -> None:
    """grpc.health.v1 and reflection, for the services that this socket has."""
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    for name in ("", *services):
        await servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    reflection.enable_server_reflection([*services, health.SERVICE_NAME, reflection.SERVICE_NAME], server)


async def _start_on_socket(server: grpc.aio.Server, path: Path, mode: int, fs: Fs) -> None:
    """Serve on a Unix socket that appears only once it has its mode."""
    scratch = path.with_name(f".{path.name}.new")
    server.add_insecure_port(f"unix:{scratch}")
    await server.start()
    fs.chmod(scratch, mode)
    fs.rename(scratch, path)


_MODEL_CACHE = model_cache_pb2.DESCRIPTOR.services_by_name["ModelCache"].full_name
_OPERATOR = operator_pb2.DESCRIPTOR.services_by_name["Operator"].full_name


async def _replicas_server(node: Node) -> grpc.aio.Server:
    server = _server()
    model_cache_pb2_grpc.add_ModelCacheServicer_to_server(ModelCache(node, for_operators=False), server)
    await _add_common(server, [_MODEL_CACHE])
    return server


async def _operators_server(node: Node, settings: Settings) -> grpc.aio.Server:
    server = _server()
    model_cache_pb2_grpc.add_ModelCacheServicer_to_server(ModelCache(node, for_operators=True), server)
    operator = Operator(node, __version__, settings.data_dir, settings.run_dir)
    operator_pb2_grpc.add_OperatorServicer_to_server(operator, server)
    await _add_common(server, [_MODEL_CACHE, _OPERATOR])
    return server


# --- the preloader, for one machine ---------------------------------------------------------


class _Preloader:
    """Keeps a preloader running beside the daemon, or takes over one that outlived an earlier daemon."""

    def __init__(self, settings: Settings, fs: Fs) -> None:
        self._settings = settings
        self._fs = fs
        self._lock = Path(settings.run_dir) / "standby" / "preloader.lock"

    async def run(self) -> None:
        """Start one whenever none is there, for ever; it is stopped when this is cancelled."""
        try:
            while True:
                if not self._fs.is_locked(self._lock):
                    await self._run_one()
                await asyncio.sleep(KEEP_PRELOADER_S)
        finally:
            await self._stop()

    async def _run_one(self) -> None:
        # A session of its own: a terminal's Ctrl-C is ours to pass on, and our own death not its end.
        # -P: no code from whatever directory the daemon was started in.
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "preloader", "serve", "--same-group"),
            *("--run-dir", self._settings.run_dir, "--data-dir", self._settings.data_dir),
            start_new_session=True,
        )
        try:
            code = await process.wait()
        except asyncio.CancelledError:
            await _end(process)
            raise
        logger.warning("the preloader ended and is started again", code=code)

    async def _stop(self) -> None:
        """End whoever holds the lock, one that we did not start included, and wait for it."""
        for number, wait_s in ((signal.SIGTERM, PRELOADER_STOP_S), (signal.SIGKILL, KEEP_PRELOADER_S)):
            deadline = asyncio.get_running_loop().time() + wait_s
            with contextlib.suppress(CachedError, ValueError, ProcessLookupError, PermissionError):
                if self._fs.is_locked(self._lock):
                    os.kill(int(self._fs.read_file(self._lock)), number)
            while self._fs.is_locked(self._lock) and asyncio.get_running_loop().time() < deadline:
                await asyncio.sleep(0.02)


async def _end(process: asyncio.subprocess.Process) -> None:
    """End our own preloader, by its process: one that has just begun has no lock yet by which to find it."""
    for stop, wait_s in ((process.terminate, PRELOADER_STOP_S), (process.kill, KEEP_PRELOADER_S)):
        with contextlib.suppress(ProcessLookupError, TimeoutError):
            stop()
            async with asyncio.timeout(wait_s):
                await process.wait()
                return


# --- serving --------------------------------------------------------------------------------


def _raise_open_files() -> None:
    """A lease costs a descriptor, a resident one for each blob."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def _serve(
    settings: Settings,
    file: Path | None,
    http: tuple[str, int] | None,
    tcp: tuple[str, int] | None,
    with_preloader: bool,
) -> None:
    _raise_open_files()
    fs = RealFs()
    sockets = _Sockets(Path(settings.run_dir))
    sockets.prepare(fs)
    stopping = _stop_signals()
    async with contextlib.AsyncExitStack() as stack:
        store = Store.open(Path(settings.data_dir), fs)
        stack.callback(store.close)
        run_lock = fs.lock(sockets.run_dir / "lock")
        stack.callback(fs.unlock, run_lock)
        metrics = Metrics(__version__)
        pool = FetchPool(settings.transfer, sources=settings.source)
        node = Node(settings, store, pool, metrics, fs, config_file=str(file or ""))
        stack.push_async_callback(node.close)
        if with_preloader:
            await stack.enter_async_context(_beside(_Preloader(settings, fs).run()))
        await node.start()
        await _open_sockets(stack, node, settings, sockets, tcp, fs)
        if http is not None:
            web = WebServer(*http, _View(node), metrics)
            await web.start()
            stack.push_async_callback(web.close)
        logger.info("serving", data_dir=settings.data_dir, run_dir=settings.run_dir, pid=os.getpid())
        await _until(stopping, node.failed())
        logger.info("parking")


async def _open_sockets(
    stack: contextlib.AsyncExitStack,
    node: Node,
    settings: Settings,
    sockets: _Sockets,
    tcp: tuple[str, int] | None,
    fs: Fs,
) -> None:
    handoff = HandoffServer(sockets.handoff, node.redeem)
    await handoff.start()
    stack.push_async_callback(handoff.close)
    replicas = await _replicas_server(node)
    if tcp is not None:
        _add_tcp(replicas, *tcp)
    stack.push_async_callback(replicas.stop, GRACE_S)
    await _start_on_socket(replicas, sockets.replicas, 0o666, fs)
    operators = await _operators_server(node, settings)
    stack.push_async_callback(operators.stop, GRACE_S)
    await _start_on_socket(operators, sockets.operators, 0o600, fs)


def _add_tcp(server: grpc.aio.Server, host: str, port: int) -> None:
    name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        server.add_insecure_port(name)
    except RuntimeError as error:
        raise permanent(
            ErrorKind.PRECONDITION,
            "ADDRESS_TAKEN",
            f"cannot listen on {name}: {error}",
            "choose another --grpc",
        ) from error


def _stop_signals() -> asyncio.Event:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    return stopping


@contextlib.asynccontextmanager
async def _beside(work: Awaitable[None]) -> AsyncIterator[None]:
    task = asyncio.ensure_future(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _until(stopping: asyncio.Event, failed: Awaitable[None]) -> None:
    """Until a signal asks to stop; raises what makes going on impossible."""
    tasks = [asyncio.ensure_future(stopping.wait()), asyncio.ensure_future(failed)]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()


if __name__ == "__main__":
    main()
