"""Probes and scrapes over real HTTP, against a view whose answers the test sets."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
from yarl import URL

from cached.metrics import Metrics
from cached.model import CachedError, Ref
from cached.web import WebServer


@dataclass
class ScriptedView:
    is_started: bool = False
    is_ready: bool = False
    models: dict[str, tuple[bool, str]] = field(default_factory=dict)

    def started(self) -> bool:
        return self.is_started

    def ready(self) -> bool:
        return self.is_ready

    def model(self, ref: Ref) -> tuple[bool, str]:
        return self.models.get(ref, (False, "absent"))


@pytest.fixture
def view() -> ScriptedView:
    return ScriptedView()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("1.2.3")


@pytest.fixture
async def server(view: ScriptedView, metrics: Metrics) -> AsyncIterator[WebServer]:
    server = WebServer("127.0.0.1", 0, view, metrics)
    await server.start()
    yield server
    await server.close()


async def get(server: WebServer, path: str) -> tuple[int, Any]:
    url = URL(f"http://127.0.0.1:{server.port}{path}", encoded=True)
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return answer.status, await answer.json()


async def test_live_says_so_whatever_else_is(server: WebServer) -> None:
    assert await get(server, "/health/live") == (200, {"status": "live"})


async def test_startup_follows_the_view(server: WebServer, view: ScriptedView) -> None:
    assert await get(server, "/health/startup") == (503, {"status": "starting"})
    view.is_started = True
    assert await get(server, "/health/startup") == (200, {"status": "started"})


async def test_ready_follows_the_view(server: WebServer, view: ScriptedView) -> None:
    view.is_started = True
    assert await get(server, "/health/ready") == (503, {"status": "not ready"})
    view.is_ready = True
    assert await get(server, "/health/ready") == (200, {"status": "ready"})


@pytest.mark.parametrize("written", ["http://127.0.0.1:80/a/b%20c", "file:///srv/models/ab", "https://h/x/"])
@pytest.mark.parametrize("safe", ["", "/:"])
async def test_a_model_is_asked_for_by_its_ref(
    server: WebServer, view: ScriptedView, written: str, safe: str
) -> None:
    ref = written.rstrip("/") + "/"
    path = "/health/models/" + quote(written, safe=safe)
    assert await get(server, path) == (503, {"ref": ref, "status": "absent"})
    view.models[ref] = (True, "verified")
    assert await get(server, path) == (200, {"ref": ref, "status": "verified"})


async def test_what_is_no_ref_is_the_askers_error(server: WebServer) -> None:
    status, body = await get(server, "/health/models/nonsense")
    assert status == 400
    assert body["reason"] == "BAD_REF" and "nonsense" in body["message"] and body["hint"]


async def test_metrics_are_scraped(server: WebServer, metrics: Metrics) -> None:
    metrics.received(42)
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{server.port}/metrics") as answer,
    ):
        assert answer.status == 200
        assert answer.headers["Content-Type"].startswith("text/plain; version=")
        text = await answer.text()
    assert "cached_origin_bytes_total 42.0" in text.splitlines()


async def test_nothing_can_be_changed(server: WebServer) -> None:
    async with aiohttp.ClientSession() as session:
        async with session.post(f"http://127.0.0.1:{server.port}/health/ready") as answer:
            assert answer.status == 405
        async with session.get(f"http://127.0.0.1:{server.port}/admin/drain") as answer:
            assert answer.status == 404


async def test_an_address_that_is_taken_is_named(view: ScriptedView, metrics: Metrics) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CachedError, match=f"127.0.0.1:{port}") as caught:
            await WebServer("127.0.0.1", port, view, metrics).start()
    assert caught.value.problem.reason == "HTTP_ADDRESS"
    assert "--http" in caught.value.problem.hint


async def test_a_closed_server_gives_its_port_back(view: ScriptedView, metrics: Metrics) -> None:
    server = WebServer("127.0.0.1", 0, view, metrics)
    await server.start()
    port = server.port
    await server.close()
    again = WebServer("127.0.0.1", port, view, metrics)
    await again.start()
    assert await get(again, "/health/live") == (200, {"status": "live"})
    await again.close()
