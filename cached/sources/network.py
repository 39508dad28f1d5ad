"""Where requests may go, and by which way: proxies, and addresses that no redirect may reach.

Owns the reading of the usual proxy variables and the kinds of addresses. Opens no connection.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping
from urllib.parse import urlsplit

from cached.model import ErrorKind, permanent

Kinds = frozenset[str]
"""Which of the places near this machine some addresses lie in; empty for all of the world."""

LOOPBACK = "loopback"
LINK_LOCAL = "link-local"
METADATA = "metadata"

# Where clouds answer a machine's own questions, besides the link-local 169.254.169.254.
_METADATA = frozenset(
    ipaddress.ip_address(text)
    for text in ("169.254.169.254", "100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254")
)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def kind_of(address: str) -> str:
    """``loopback``, ``link-local``, ``metadata``, or an empty text for every other IP address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        ip = ip.ipv4_mapped or (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else ip)
    if ip in _METADATA:
        return METADATA
    # The unspecified address, and all of its network in IPv4, is this machine too.
    if ip.is_loopback or ip.is_unspecified or (ip.version == 4 and int(ip) < 1 << 24):
        return LOOPBACK
    return LINK_LOCAL if ip.is_link_local else ""


def kinds_of_host(host: str) -> Kinds:
    """The kinds of all that a name leads to; empty where this machine cannot resolve it (a proxy may)."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return frozenset()
    return frozenset(kind_of(str(address[4][0])) for address in found) - {""}


def check_kinds(found: Kinds, allowed: Kinds, host: str) -> None:
    """Raises CachedError (PERMISSION_DENIED ``UNSAFE_REDIRECT``)."""
    if not found <= allowed:
        raise permanent(
            ErrorKind.DENIED,
            "UNSAFE_REDIRECT",
            f"the origin redirects to {host[:200]}, which is a {min(found - allowed)} address: "
            "such an origin could have this node ask its own services",
            "name the address that it leads to, if that is meant",
        )


def proxy_for(url: str, env: Mapping[str, str]) -> str | None:
    """The proxy's address for ``url``; None to go there directly.

    As most programs do: ``https_proxy`` before ``HTTPS_PROXY`` before ``all_proxy``, but for what
    ``no_proxy`` names, and never for this machine itself. Raises CachedError (``BAD_PROXY``).
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    found = _first(env, f"{parts.scheme}_proxy") or _first(env, "all_proxy")
    if not found or _is_here(host) or _is_excepted(host, parts.port, _first(env, "no_proxy")):
        return None
    found = found if "://" in found else f"http://{found}"
    proxy = urlsplit(found)
    if proxy.scheme not in ("http", "https") or not proxy.hostname:
        # It may have a password in it, and is not shown.
        raise permanent(
            ErrorKind.PRECONDITION,
            "BAD_PROXY",
            f"the proxy that the environment names for {parts.scheme} is none that can be used",
            "write http://host:port or https://host:port into HTTPS_PROXY, HTTP_PROXY or ALL_PROXY",
        )
    return found


def _first(env: Mapping[str, str], name: str) -> str:
    return (env.get(name) or env.get(name.upper()) or "").strip()


def _is_here(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and kind_of(host) == LOOPBACK)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def _is_excepted(host: str, port: int | None, exceptions: str) -> bool:
    return any(
        _excepts(entry.strip().lower(), host, port) for entry in exceptions.split(",") if entry.strip()
    )


def _excepts(entry: str, host: str, port: int | None) -> bool:
    if entry == "*":
        return True
    if "/" in entry:
        return _is_address(host) and _is_inside(host, entry)
    name, colon, number = entry.rpartition(":")
    if colon and number.isdecimal() and ":" not in name:
        if port is None or port != int(number):
            return False
        entry = name
    entry = entry.strip("[]").removeprefix("*").removeprefix(".")
    return host == entry or (bool(entry) and host.endswith(f".{entry}"))


def _is_inside(host: str, network: str) -> bool:
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(network, strict=False)
    except ValueError:
        return False
