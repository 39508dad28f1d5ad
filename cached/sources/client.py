"""One HTTP conversation at a time, with suspicion: connections, redirects, proxies, authorities, errors.

Owns the connections and the way to an answer; knows no listing and no file. Follows redirects by
itself, as each has to be looked at: none leads to this machine or its link unless the origin is there, none
from TLS to none, and what proves who asks goes to no other host. Never asks twice.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import ssl
import struct
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from http.client import IncompleteRead
from pathlib import Path

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError, InvalidHeader, LocationParseError, MaxRetryError
from urllib3.response import BaseHTTPResponse, HTTPResponse

from cached.model import CachedError, ErrorKind, permanent, temporary
from cached.sources.network import Kinds, check_kinds, kind_of, kinds_of_host, proxy_for
from cached.sources.sums import SUMS_NAME

MAX_REDIRECTS = 5
PIECE_S = 1.0
"""For how long a piece is filled with what trickles in."""
MAX_HOSTS = 16
MAX_PROXIES = 8
MAX_DRAINED_BYTES = 64 * 1024
MAX_RETRY_AFTER_S = 3600.0
AGENT = "cached"

_BUSY = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}
_PRIVATE_HEADERS = {"authorization", "cookie"}


class HttpClient:
    """Thread-safe; connections are kept and shared by everything that is asked through this."""

    def __init__(self, connections: int, timeout_s: float, env: Mapping[str, str]) -> None:
        self._connections = connections
        self._timeout_s = timeout_s
        self._env = env
        self._lock = threading.Lock()
        self._managers: dict[object, urllib3.PoolManager] = {}

    def close(self) -> None:
        for manager in self._managers.values():
            manager.clear()

    @contextlib.contextmanager
    def request(
        self, method: str, url: str, headers: Mapping[str, str] | None = None, origin: str | None = None
    ) -> Iterator[BaseHTTPResponse]:
        """One answer, its body unread. The connection is kept for the next request if it was read whole.

        ``origin`` is whoever gave out ``url``, which then may lead no further than a redirect of it.
        Raises CachedError where there is no answer; which answers are good is the caller's to say.
        """
        with _errors(url):
            response = self._follow(method, url, dict(headers or {}), origin or url)
            try:
                yield response
            except BaseException:
                response.close()
                raise
            _leave(response)

    def _follow(self, method: str, url: str, headers: dict[str, str], origin: str) -> BaseHTTPResponse:
        here = url
        for _ in range(MAX_REDIRECTS + 1):
            own = _host(here) == _host(origin)
            response = self._send(method, here, headers, None if own else kinds_of_host(_host(origin)))
            location = response.get_redirect_location()
            if not location:
                return response
            _leave(response)
            target = led_to(here, location)
            _check_scheme(here, target)
            if not same_host(here, target):
                headers = {k: v for k, v in headers.items() if k.lower() not in _PRIVATE_HEADERS}
            here = target
        raise permanent(
            ErrorKind.FAILED,
            "TOO_MANY_REDIRECTS",
            f"{url}: the server redirects more than {MAX_REDIRECTS} times",
            "name the address that it leads to",
        )

    def _send(
        self, method: str, url: str, headers: Mapping[str, str], allowed: Kinds | None
    ) -> BaseHTTPResponse:
        """``allowed``: the kinds of addresses near this machine that may be reached; None for all."""
        proxy = proxy_for(url, self._env)
        if proxy is not None and allowed is not None:
            # The proxy resolves the name, and may do it otherwise: this is the best that can be known here.
            check_kinds(kinds_of_host(_host(url)), allowed, _host(url))
        manager = self._manager(proxy, allowed if proxy is None else None)
        merged = {"Accept-Encoding": "identity", "User-Agent": AGENT, **headers}
        response = manager.request(
            method, url, headers=merged, preload_content=False, decode_content=False, redirect=False
        )
        # Some ways through urllib3 leave only the path in it.
        response.url = url
        return response

    def _manager(self, proxy: str | None, allowed: Kinds | None) -> urllib3.PoolManager:
        with self._lock:
            key = (proxy, allowed)
            if key not in self._managers:
                assert len(self._managers) < MAX_PROXIES + 8, "the environment names a proxy for each scheme"
                self._managers[key] = self._make(proxy, allowed)
            return self._managers[key]

    def _make(self, proxy: str | None, allowed: Kinds | None) -> urllib3.PoolManager:
        context = _trust(self._env)
        timeout = urllib3.Timeout(connect=self._timeout_s, read=self._timeout_s)
        # Who asks knows better whether and when to ask again, and redirects are followed by hand.
        retries = urllib3.Retry(total=0, redirect=0, respect_retry_after_header=False, raise_on_status=False)
        if proxy is not None:
            parts = urllib.parse.urlsplit(proxy)
            login = f"{parts.username or ''}:{parts.password or ''}" if parts.username else None
            return urllib3.ProxyManager(
                parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl(),
                num_pools=MAX_HOSTS,
                proxy_headers=urllib3.make_headers(
                    proxy_basic_auth=None if login is None else urllib.parse.unquote(login)
                ),
                proxy_ssl_context=context,
                maxsize=self._connections,
                timeout=timeout,
                retries=retries,
                ssl_context=context,
            )
        manager = urllib3.PoolManager(
            num_pools=MAX_HOSTS,
            maxsize=self._connections,
            timeout=timeout,
            retries=retries,
            ssl_context=context,
        )
        if allowed is not None:
            manager.pool_classes_by_scheme = _guarded(allowed)
        return manager


class Body:
    """An answer's body, read to where it is wanted.

    ``readinto`` of urllib3 reads into fresh memory and copies that, and the layers below it take a step in
    Python for every few packets: both cost more than the network. Whole pieces are taken from the connection
    itself; for the first bytes and the last, which end the answer, the layers are asked.
    """

    def __init__(self, response: BaseHTTPResponse) -> None:
        self._response = response
        raw = response._fp if isinstance(response, HTTPResponse) else None
        self._raw = raw if isinstance(raw, http.client.HTTPResponse) else None
        self._connection = _connection(self._raw) if self._raw is not None else None
        self._is_ahead = True

    def read_into(self, view: memoryview) -> int:
        """Fill ``view``, or some of it; the number of bytes, 0 at the end. Raises what urllib3 does."""
        response, raw = self._response, self._raw
        if raw is None or not isinstance(response, HTTPResponse):
            return response.readinto(view)
        with response._error_catcher():
            count = 0 if raw.closed else self._next(raw, view)
        response._fp_bytes_read += count
        if response.length_remaining is not None:
            response.length_remaining -= count
        return count

    def _next(self, raw: http.client.HTTPResponse, view: memoryview) -> int:
        left = raw.length
        if self._connection is None or left is None or left <= 1:
            return raw.readinto(view)  # which puts the connection back at the end
        if self._is_ahead:
            # What was read with the headers comes first.
            ahead = len(raw.fp.peek(1))
            self._is_ahead = ahead > len(view)
            return raw.readinto(view[:ahead])
        count = self._connection.read_into(view[: left - 1])
        raw.length = left - count
        return count

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()


class _Plain:
    def __init__(self, again: socket.socket) -> None:
        self._socket = again

    def read_into(self, view: memoryview) -> int:
        try:
            return self._socket.recv_into(view, len(view), socket.MSG_WAITALL)
        except BlockingIOError as error:
            raise TimeoutError("timed out") from error

    def close(self) -> None:
        self._socket.close()


class _Tls:
    def __init__(self, own: ssl.SSLSocket) -> None:
        self._socket = own

    def read_into(self, view: memoryview) -> int:
        """It gives out one record of 16 KiB at a time; who sends less is not waited for without end."""
        done, until_s = 0, time.monotonic() + PIECE_S
        while done < len(view) and (count := self._socket.recv_into(view[done:])):
            done += count
            if time.monotonic() > until_s:
                break
        return done

    def close(self) -> None:
        """The connection is its pool's."""


def _connection(raw: http.client.HTTPResponse) -> _Plain | _Tls | None:
    """What an answer comes through, to read whole pieces from; None where that is unknown."""
    own = getattr(getattr(raw.fp, "raw", None), "_sock", None)
    if isinstance(own, ssl.SSLSocket):
        return _Tls(own)
    if type(own) is not socket.socket or own.gettimeout() is None:
        return None
    return _Plain(_again(own, own.gettimeout() or 0.0))


def _again(own: socket.socket, timeout_s: float) -> socket.socket:
    """The same connection, reading from which waits in the kernel for all that was asked for."""
    again = socket.socket(fileno=os.dup(own.fileno()))
    # Python's own timeouts wait for the first bytes of a piece only, and then in two steps.
    again.setblocking(True)
    again.setsockopt(
        socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6))
    )
    return again


def final_url(response: BaseHTTPResponse) -> str:
    """Where an answer came from in the end."""
    return response.url or ""


def led_to(here: str, location: str) -> str:
    """The address that an answer from ``here`` names. Raises CachedError (``BAD_REDIRECT``)."""
    try:
        target = urllib.parse.urljoin(here, location)
        urllib.parse.urlsplit(target).port  # noqa: B018 (raises for what is no port)
    except ValueError as error:
        raise permanent(
            ErrorKind.FAILED,
            "BAD_REDIRECT",
            f"{here}: the server leads to {location[:200]!r}, which is no address: {error}",
            "the server is broken: mend it, or name the address that it means",
        ) from error
    return target


def same_host(one: str, other: str) -> bool:
    """Whether two addresses are of one server: its scheme, name and port."""
    first, second = urllib.parse.urlsplit(one), urllib.parse.urlsplit(other)
    ports = [part.port or {"http": 80, "https": 443}.get(part.scheme) for part in (first, second)]
    return (first.scheme, first.hostname, ports[0]) == (second.scheme, second.hostname, ports[1])


def _host(url: str) -> str:
    return urllib.parse.urlsplit(url).hostname or ""


def _check_scheme(here: str, target: str) -> None:
    scheme = urllib.parse.urlsplit(target).scheme
    if scheme not in ("http", "https") or (scheme == "http" and here.startswith("https:")):
        raise permanent(
            ErrorKind.DENIED,
            "UNSAFE_REDIRECT",
            f"{here}: the server redirects from {here.partition(':')[0]} to {scheme[:20]}",
            "name the address that it leads to, if that is meant",
        )


def _leave(response: BaseHTTPResponse) -> None:
    """Give the connection back where that costs little."""
    left = response.length_remaining
    if left is None or left > MAX_DRAINED_BYTES:
        response.close()
    else:
        # Also an answer without a body has to be read, or its connection cannot be used again.
        response.drain_conn()
        response.release_conn()


def _guarded(allowed: Kinds) -> dict[str, type[HTTPConnectionPool]]:
    """Pools whose connections reach no address near this machine but of the ``allowed`` kinds.

    Looked at before connecting, so that nothing is asked of such a place, and once more at what was reached:
    a name may lead elsewhere from one moment to the next.
    """

    class Plain(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            check_kinds(kinds_of_host(self.host), allowed, self.host)
            return _checked(super()._new_conn(), allowed, self.host)

    class Tls(HTTPSConnection):
        def _new_conn(self) -> socket.socket:
            check_kinds(kinds_of_host(self.host), allowed, self.host)
            return _checked(super()._new_conn(), allowed, self.host)

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class TlsPool(HTTPSConnectionPool):
        ConnectionCls = Tls

    return {"http": PlainPool, "https": TlsPool}


def _checked(connected: socket.socket, allowed: Kinds, host: str) -> socket.socket:
    try:
        check_kinds(frozenset({kind_of(connected.getpeername()[0])}) - {""}, allowed, host)
    except BaseException:
        connected.close()
        raise
    return connected


def _trust(env: Mapping[str, str]) -> ssl.SSLContext:
    """The authorities that the usual variables name, in the place of the system's where they do."""
    name = next((n for n in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE") if env.get(n)), None)
    try:
        if name is not None:
            return _trusting(env[name])
        if env.get("SSL_CERT_DIR"):
            name = "SSL_CERT_DIR"
            return ssl.create_default_context(capath=env[name])
    except (OSError, ssl.SSLError) as error:
        raise permanent(
            ErrorKind.PRECONDITION,
            "BAD_CA_BUNDLE",
            f"{name} names {env.get(name or '', '')[:200]}, which cannot be read as certificates: {error}",
            "correct the variable where the daemon runs, or take it away for the system's authorities",
        ) from error
    return ssl.create_default_context()


def _trusting(bundle: str) -> ssl.SSLContext:
    if Path(bundle).is_dir():
        return ssl.create_default_context(capath=bundle)
    return ssl.create_default_context(cafile=bundle)


def check_plain(response: BaseHTTPResponse, url: str) -> None:
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise permanent(
            ErrorKind.FAILED,
            "ORIGIN_ENCODES",
            f"{url}: the server sends Content-Encoding {encoding[:40]!r} where identity was asked for",
            "switch compression off for this folder",
        )


def check_status(response: BaseHTTPResponse, url: str) -> None:
    """Raises CachedError unless the answer carries content."""
    status = response.status
    if status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
        return
    said = f"{url}: the server answered {status} {response.reason or ''}".rstrip()
    if status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
        raise permanent(
            ErrorKind.NOT_FOUND,
            "MISSING_FILE",
            f"{url} is missing at the origin, which answered {status}",
            f"put it there, or correct the ref or its {SUMS_NAME}",
        )
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        raise permanent(
            ErrorKind.DENIED, "ORIGIN_DENIED", said, "let this node read the folder, or correct the ref"
        )
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR or status in _BUSY:
        raise temporary(
            "ORIGIN_UNAVAILABLE",
            said,
            "see the origin's own log; it is asked again",
            _retry_after_s(response),
        )
    raise permanent(
        ErrorKind.FAILED, "ORIGIN_REFUSED", said, "open this address by hand, and correct the ref"
    )


def _retry_after_s(response: BaseHTTPResponse) -> float:
    header = response.headers.get("Retry-After")
    if header is None:
        return 0.0
    with contextlib.suppress(InvalidHeader, OverflowError):
        return min(max(0.0, urllib3.Retry().parse_retry_after(header)), MAX_RETRY_AFTER_S)
    return 0.0


@contextlib.contextmanager
def _errors(url: str) -> Iterator[None]:
    try:
        yield
    except (HTTPError, OSError) as error:
        raise _connection_error(error, url) from error


def _connection_error(error: Exception, url: str) -> CachedError:
    cause: BaseException = error
    if isinstance(error, MaxRetryError) and error.reason is not None:
        cause = error.reason
    if isinstance(cause, urllib3.exceptions.ResponseError):
        return permanent(
            ErrorKind.FAILED,
            "TOO_MANY_REDIRECTS",
            f"{url}: the server redirects more than {MAX_REDIRECTS} times",
            "name the address that it leads to",
        )
    if isinstance(cause, urllib3.exceptions.LocationValueError | LocationParseError):
        return permanent(ErrorKind.INVALID, "BAD_REF", f"{url} is no address: {cause}", "correct the ref")
    if _has_cause(cause, ssl.SSLCertVerificationError):
        return permanent(
            ErrorKind.DENIED,
            "ORIGIN_CERTIFICATE",
            f"{url}: the server's certificate is not trusted: {cause}",
            "add the authority that signed it to this node's trusted ones (SSL_CERT_FILE)",
        )
    if isinstance(cause, urllib3.exceptions.IncompleteRead) or _has_cause(cause, IncompleteRead):
        return temporary(
            "ORIGIN_BROKE_OFF",
            f"{url}: the server closed the connection in the middle of its answer",
            "see the server's log, and what is between it and this node",
            0.0,
        )
    return temporary(
        "ORIGIN_UNREACHABLE",
        f"{url}: {_words(cause)}"[:500],
        "check that the origin runs, and that this node reaches it; it is asked again",
        0.0,
    )


def _words(error: BaseException) -> str:
    """urllib3 says some things as a tuple of a text and the error that it is about."""
    inner = error.args[-1] if isinstance(error, urllib3.exceptions.ProtocolError) and error.args else None
    return f"{type(inner).__name__}: {inner}" if isinstance(inner, Exception) else str(error)


def _has_cause(error: BaseException | None, kind: type[BaseException]) -> bool:
    for _ in range(8):
        if error is None:
            return False
        if isinstance(error, kind) or any(isinstance(part, kind) for part in error.args):
            return True
        error = error.__cause__ or error.__context__
    return False
