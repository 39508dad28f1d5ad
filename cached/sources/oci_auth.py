"""Who asks a registry: credentials by reference, and the tokens that they are exchanged for.

Owns challenges, the conversation with a registry's token server, and tokens for as long as they hold; in
memory only, and in no message. Runs no program: of Docker's configuration only what stands in the file itself
is used, and its credential helpers are not.
"""

from __future__ import annotations

import base64
import contextlib
import re
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Annotated

import msgspec

from cached.config import SourceSettings
from cached.model import CachedError, ErrorKind, permanent
from cached.sources.client import HttpClient, check_plain, check_status
from cached.sources.secrets import token_of

MAX_CONFIG_BYTES = 1024 * 1024
MAX_ANSWER_BYTES = 256 * 1024
MAX_TOKEN_CHARS = 64 * 1024
MAX_CHALLENGES = 8
MAX_CHALLENGE_CHARS = 4096
MAX_REPOS = 256
"""More have their tokens asked for anew."""
TOKEN_S = 60.0
"""How long a token holds whose server does not say: so the specification has it."""
MAX_TOKEN_S = 3600.0
EARLY_S = 5.0
"""A token this near to its end is not begun a transfer with."""

# A second challenge in one header begins behind a comma; a comma inside of quotes is none.
_CHALLENGE = re.compile(r'(?:^|,)\s*(basic|bearer)\s+((?:[^",]|"[^"]*"|,(?!\s*(?:basic|bearer)\s))*)', re.I)
_PARAMETER = re.compile(r'([a-z_]+)\s*=\s*(?:"([^"]*)"|([^\s",]+))', re.I)


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user's name and password; or, where ``user`` is empty, a token that is shown as it is."""

    user: str = field(repr=False)
    secret: str = field(repr=False)

    @property
    def basic(self) -> str:
        return "Basic " + base64.b64encode(f"{self.user}:{self.secret}".encode()).decode()


class _Token(msgspec.Struct, frozen=True):
    token: str = ""
    access_token: str = ""
    expires_in: Annotated[float, msgspec.Meta(ge=0)] | None = None


class _Login(msgspec.Struct, frozen=True):
    auth: str = ""
    username: str = ""
    password: str = ""
    registrytoken: str = ""
    identitytoken: str = ""


class _DockerConfig(msgspec.Struct, frozen=True):
    auths: dict[str, _Login] = {}


class RegistryAuth:
    """What to show a registry for each of its repositories. Thread-safe."""

    def __init__(self, client: HttpClient, settings: SourceSettings, env: Mapping[str, str]) -> None:
        self._client = client
        self._settings = settings
        self._env = env
        self._lock = threading.Lock()
        self._asking = threading.Lock()
        self._shown: dict[tuple[str, str], tuple[str, float]] = {}

    def header(self, registry: str, repo: str, now_s: float) -> str:
        """What is shown at present; empty where nothing was asked for, or it holds no longer."""
        with self._lock:
            shown, until_s = self._shown.get((registry, repo), ("", 0.0))
            return shown if now_s < until_s else ""

    def answer(self, registry: str, repo: str, url: str, refused: str, challenges: Sequence[str]) -> str:
        """What to show instead of ``refused``, which met ``challenges`` at ``url``.

        Empty where nothing else can be shown. Raises CachedError where the credentials or the token server
        cannot be had.
        """
        # One asks, for all who were refused the same.
        with self._asking:
            shown = self.header(registry, repo, time.monotonic())
            if shown and shown != refused:
                return shown
            asked = _parse(challenges)
            login = self._credentials(registry)
            if "bearer" in asked:
                shown, ttl_s = self._bearer(repo, url, asked["bearer"], login)
            elif "basic" in asked and login is not None and login.user:
                shown, ttl_s = login.basic, MAX_TOKEN_S
            if not shown or shown == refused:
                return ""
            self._keep(registry, repo, shown, time.monotonic() + ttl_s)
            return shown

    def known(self, registry: str) -> bool:
        """Whether there are credentials for it."""
        return self._credentials(registry) is not None

    def _keep(self, registry: str, repo: str, shown: str, until_s: float) -> None:
        with self._lock:
            if len(self._shown) >= MAX_REPOS:
                self._shown.pop(next(iter(self._shown)))
            self._shown[registry, repo] = (shown, until_s)

    # --- the token server -------------------------------------------------------------------

    def _bearer(
        self, repo: str, url: str, challenge: Mapping[str, str], login: Credentials | None
    ) -> tuple[str, float]:
        """The header, and for how long it holds."""
        if login is not None and not login.user:
            return f"Bearer {login.secret}", MAX_TOKEN_S
        realm = challenge.get("realm", "")
        _check_realm(realm, url)
        asked = {"scope": challenge.get("scope") or f"repository:{repo}:pull"}
        if challenge.get("service"):
            asked["service"] = challenge["service"]
        query = urllib.parse.urlencode(asked)
        found = self._ask(f"{realm}{'&' if '?' in realm else '?'}{query}", realm, url, login)
        token = found.token or found.access_token
        if not token or len(token) > MAX_TOKEN_CHARS or not token.isascii() or not token.isprintable():
            raise _bad_realm(url, realm, "answers without a token")
        told_s = TOKEN_S if found.expires_in is None else min(found.expires_in, MAX_TOKEN_S)
        # One that ends at once is still good for the request that it was asked for.
        return f"Bearer {token}", max(told_s - EARLY_S, told_s / 2)

    def _ask(self, address: str, realm: str, url: str, login: Credentials | None) -> _Token:
        headers = {} if login is None else {"Authorization": login.basic}
        # The registry names it, so it may lead no further than a redirect of the registry's.
        with self._client.request("GET", address, headers, url) as response:
            if response.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
                raise permanent(
                    ErrorKind.DENIED,
                    "ORIGIN_DENIED",
                    f"{realm}: the registry's token server answered {response.status}, for {url}",
                    hint_of(login is not None),
                )
            check_status(response, realm)
            check_plain(response, realm)
            data = bytearray()
            while len(data) <= MAX_ANSWER_BYTES and (piece := response.read(64 * 1024)):
                data += piece
        try:
            return _TOKEN.decode(bytes(data))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            # What it did answer may have a token in it.
            raise _bad_realm(url, realm, "answers what no token server does") from error

    # --- credentials ------------------------------------------------------------------------

    def _credentials(self, registry: str) -> Credentials | None:
        if self._settings.anonymous:
            return None
        named = token_of(self._settings, self._env)
        if named is not None:
            user, colon, password = named.partition(":")
            return Credentials(user, password) if colon and user else Credentials("", named)
        return self._usual_credentials(registry)

    def _usual_credentials(self, registry: str) -> Credentials | None:
        """From the file that ``docker login``, ``oras login`` and Kubernetes write."""
        path = _config_path(self._env)
        if path is None:
            return None
        with _reading(path):
            if not path.exists():
                return None
            with path.open("rb") as file:
                data = file.read(MAX_CONFIG_BYTES)
            auths = _CONFIG.decode(data).auths
            for name, login in auths.items():
                if _registry_of(name) == registry:
                    return _credentials_of(login, path)
        return None


def hint_of(known: bool) -> str:
    """What to do about a refusal; ``known``: whether there were credentials."""
    if known:
        return (
            "the credentials are not valid there, or may not pull this: see token_env or token_file, "
            "or auths in docker's config.json"
        )
    return (
        "correct the name, or give this node credentials that may pull it: token_env or token_file in a "
        "[[source]] table (user:password, or a token), or auths in docker's config.json (whose credential "
        "helpers are not run)"
    )


_TOKEN = msgspec.json.Decoder(_Token)
_CONFIG = msgspec.json.Decoder(_DockerConfig)


def _parse(challenges: Sequence[str]) -> dict[str, dict[str, str]]:
    """Each scheme that we know, in lower case, with its parameters."""
    return {
        scheme.lower(): {name.lower(): quoted or bare for name, quoted, bare in _PARAMETER.findall(rest)}
        for challenge in challenges[:MAX_CHALLENGES]
        for scheme, rest in _CHALLENGE.findall(challenge[:MAX_CHALLENGE_CHARS])
    }


def _check_realm(realm: str, url: str) -> None:
    parts = urllib.parse.urlsplit(realm)
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or parts.username
        or not realm.isprintable()
    ):
        raise _bad_realm(url, realm, "is no address")
    if parts.scheme == "http" and url.startswith("https:"):
        raise _bad_realm(url, realm, "would have the password sent without TLS")


def _bad_realm(url: str, realm: str, what: str) -> CachedError:
    # Without a login that stands in it.
    shown = realm.rpartition("@")[2][:200]
    return permanent(
        ErrorKind.FAILED,
        "BAD_CHALLENGE",
        f"{url}: the registry names {shown!r} as its token server, which {what}",
        "see the registry's configuration (auth, token, realm)",
    )


def _config_path(env: Mapping[str, str]) -> Path | None:
    if env.get("DOCKER_CONFIG"):
        return Path(env["DOCKER_CONFIG"]).expanduser() / "config.json"
    # A service may have no home.
    return Path(env["HOME"]) / ".docker" / "config.json" if env.get("HOME") else None


def _registry_of(name: str) -> str:
    """Entries are called by the registry, or, as of old, by an address of it."""
    host = name.partition("://")[2] or name
    host = host.partition("/")[0].lower()
    return "docker.io" if host == "index.docker.io" else host


def _credentials_of(login: _Login, path: Path) -> Credentials | None:
    if login.registrytoken:
        return Credentials("", login.registrytoken)
    user, password = login.username, login.password
    if login.auth:
        user, _, password = base64.b64decode(login.auth, validate=True).decode().partition(":")
    if user and password:
        return Credentials(user, password)
    if login.identitytoken:
        raise _no_secret(path, "an identitytoken is not used here")
    # Such an entry stands for one that a helper keeps.
    return None


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _no_secret(path, error.strerror or "it cannot be read") from error
    except ValueError as error:
        # Of what is in it nothing is shown.
        raise _no_secret(path, "it is not docker's config.json") from error


def _no_secret(path: Path, why: str) -> CachedError:
    return permanent(
        ErrorKind.PRECONDITION,
        "NO_SECRET",
        f"the registry's credentials in {path}: {why}",
        "mend the file or let the daemon's user read it; or set token_env, token_file or anonymous = true "
        "for this [[source]]",
    )
