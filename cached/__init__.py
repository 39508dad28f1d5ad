"""The public face of the client; filled lazily so that importing it stays light.

Owns the names ``acquire``, ``watch`` and their async twins, ``Model``, ``Change``, ``Progress`` and
``CachedError``, which it imports once they are used. gRPC comes with the first acquire, torch with the
first tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cached.client import (
        CachedError,
        Change,
        Model,
        Progress,
        acquire,
        acquire_async,
        watch,
        watch_async,
    )

    __version__: str

__all__ = [
    "CachedError",
    "Change",
    "Model",
    "Progress",
    "__version__",
    "acquire",
    "acquire_async",
    "watch",
    "watch_async",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in __all__:
        from cached import client

        value = getattr(client, name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("cached")
    except metadata.PackageNotFoundError:  # run from a source tree that was not installed
        return "0+source"
