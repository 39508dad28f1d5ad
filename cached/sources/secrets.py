"""Secrets by reference: read when they are needed, from where the settings say that they stand.

Owns the reading. What it returns goes to an origin and nowhere else: into no message, record or log.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path

from cached.config import SourceSettings
from cached.model import CachedError, ErrorKind, permanent

MAX_SECRET_BYTES = 64 * 1024


def token_of(settings: SourceSettings, env: Mapping[str, str]) -> str | None:
    """The token that the settings name; None where they name none. Raises CachedError (``NO_SECRET``)."""
    if settings.token_env:
        return _from_env(settings.token_env, env, "token_env", settings)
    if settings.token_file:
        return _from_file(settings.token_file, "token_file", settings)
    return None


def options_of(settings: SourceSettings, env: Mapping[str, str]) -> dict[str, str]:
    """The options with ``env:NAME`` and ``file:/path`` replaced by what stands there. Raises CachedError."""
    options = dict(settings.options)
    for name, value in settings.options.items():
        kind, _, place = value.partition(":")
        if kind == "env":
            options[name] = _from_env(place, env, f"options.{name}", settings)
        elif kind == "file" and place.startswith("/") and not place.startswith("//"):
            options[name] = _from_file(place, f"options.{name}", settings)
    return options


def read_secret(path: Path) -> str:
    """A short text file's content, without the space around it. Raises OSError."""
    with path.open("rb") as file:
        data = file.read(MAX_SECRET_BYTES + 1)
    text = data.decode("utf-8", "replace").strip()
    if len(data) > MAX_SECRET_BYTES or not text.isprintable():
        # A header with a line break in it would be two; so it is refused before anybody sends it.
        raise OSError(errno.EINVAL, "it does not hold a secret, but something longer or of several lines")
    return text


def _from_env(name: str, env: Mapping[str, str], key: str, settings: SourceSettings) -> str:
    text = env.get(name, "").strip()
    if not text or not text.isprintable():
        raise _no_secret(settings, key, f"the variable {name} is not set where the daemon runs")
    return text


def _from_file(path: str, key: str, settings: SourceSettings) -> str:
    try:
        text = read_secret(Path(path))
    except OSError as error:
        said = error.strerror or os.strerror(error.errno or 0)
        raise _no_secret(settings, key, f"{path}: {said}") from error
    if not text:
        raise _no_secret(settings, key, f"{path} is empty")
    return text


def _no_secret(settings: SourceSettings, key: str, why: str) -> CachedError:
    return permanent(
        ErrorKind.PRECONDITION,
        "NO_SECRET",
        f"source {settings.prefix!r}, {key}: {why}",
        "put the secret there, or correct the configuration",
    )
