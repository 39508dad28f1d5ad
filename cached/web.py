"""HTTP for probes and scrapes: ``/health/…`` and ``/metrics``.

Owns the routes and the words of their answers. Reads what is so through ``View`` and changes nothing; what
operators do goes over their socket, never over this port.

Probes: ``/health/live`` answers 200 while the event loop turns, ``/health/startup`` once the store is
scanned, ``/health/ready`` while the daemon serves, ``/health/models/<ref>`` while that model is proven here.
Whatever is not so answers 503, with the state in a JSON body.
"""

from __future__ import annotations

from typing import Protocol

from aiohttp import web

from cached.metrics import Metrics
from cached.model import CachedError, ErrorKind, Ref, parse_ref, permanent

# Probes come seconds apart and scrapes rarer still; a connection that is kept for longer is only a cost.
KEEPALIVE_S = 15.0
SHUTDOWN_S = 1.0


class View(Protocol):
    """What the daemon lets be seen. Answers come at once, from memory."""

    def started(self) -> bool: ...

    def ready(self) -> bool: ...

    def model(self, ref: Ref) -> tuple[bool, str]:
        """Whether the model is proven and here, and its state in words."""
        ...


class WebServer:
    """Serves ``view`` and ``metrics`` between start() and close(); port 0 takes a free one."""

    def __init__(self, host: str, port: int, view: View, metrics: Metrics) -> None:
        self._host = host
        self._asked_port = port
        self._view = view
        self._metrics = metrics
        app = web.Application()
        app.router.add_get("/health/live", self._live)
        app.router.add_get("/health/startup", self._startup)
        app.router.add_get("/health/ready", self._ready)
        app.router.add_get("/health/models/{ref:.+}", self._model)
        app.router.add_get("/metrics", self._scrape)
        self._runner = web.AppRunner(
            app,
            access_log=None,
            handle_signals=False,
            keepalive_timeout=KEEPALIVE_S,
            shutdown_timeout=SHUTDOWN_S,
        )

    async def start(self) -> None:
        """Bind and serve. Raises CachedError (PRECONDITION) when the address cannot be had."""
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self._asked_port).start()
        except (OSError, OverflowError) as error:
            await self._runner.cleanup()
            raise permanent(
                ErrorKind.PRECONDITION,
                "HTTP_ADDRESS",
                f"cannot serve HTTP on {self._host}:{self._asked_port}: {error}",
                "choose another address with --http HOST:PORT, or end what listens there",
            ) from error

    async def close(self) -> None:
        await self._runner.cleanup()

    @property
    def port(self) -> int:
        """The port that was bound. Only between start() and close()."""
        port = self._runner.addresses[0][1]
        assert isinstance(port, int)
        return port

    async def _live(self, request: web.Request) -> web.Response:
        return _answer(True, status="live")

    async def _startup(self, request: web.Request) -> web.Response:
        started = self._view.started()
        return _answer(started, status="started" if started else "starting")

    async def _ready(self, request: web.Request) -> web.Response:
        ready = self._view.ready()
        return _answer(ready, status="ready" if ready else "not ready")

    async def _model(self, request: web.Request) -> web.Response:
        try:
            ref = parse_ref(request.match_info["ref"])
        except CachedError as error:
            body = {"reason": error.problem.reason, "message": str(error), "hint": error.problem.hint}
            return web.json_response(body, status=400)
        ready, state = self._view.model(ref)
        return _answer(ready, ref=ref, status=state)

    async def _scrape(self, request: web.Request) -> web.Response:
        body, content_type = self._metrics.exposition()
        return web.Response(body=body, headers={"Content-Type": content_type})


def _answer(good: bool, **body: str) -> web.Response:
    return web.json_response(body, status=200 if good else 503)
