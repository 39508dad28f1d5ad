"""What the preloader's processes log: one JSON object a line, or a readable form on a terminal.

Owns the look of a line (``timestamp``, ``level``, ``event``, and the fields that came with it), the same as
the daemon's, with the standard library alone. Decides nothing.
"""

from __future__ import annotations

import json
import logging
import time
from typing import Any, TextIO


def configure(stream: TextIO) -> None:
    """Log to ``stream`` from now on: JSON lines unless it is a terminal."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Readable() if stream.isatty() else _Json())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def fields(**values: Any) -> dict[str, Any]:
    """What goes beside an event: ``log.info("resident", extra=fields(artifact=…))``."""
    return {"fields": values}


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        body = {"timestamp": _iso_utc(record.created), "level": record.levelname.lower()}
        body |= {"event": record.getMessage(), **getattr(record, "fields", {})}
        if record.exc_info:
            body["exception"] = self.formatException(record.exc_info)
        return json.dumps(body, default=str)


class _Readable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        said = " ".join(f"{key}={value}" for key, value in getattr(record, "fields", {}).items())
        line = (
            f"{_iso_utc(record.created)} {record.levelname.lower():8} {record.getMessage()} {said}".rstrip()
        )
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _iso_utc(unix_s: float) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(unix_s))
    return f"{whole}.{int(unix_s % 1 * 1e6):06d}Z"
