"""What the processes log, and how it looks: one JSON object a line, or a readable form on a terminal.

Owns the set-up of logging, once per process, by whoever composes it. Everybody else asks for
``structlog.get_logger()`` and binds ids (``lease``, ``artifact``, ``ref``, ``device``). Decides nothing.

Each line has ``timestamp`` (ISO 8601, UTC), ``level``, ``event`` and what was bound. Lines of libraries that
use the standard library's logging look the same, with their ``logger``'s name.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TextIO

import structlog
from structlog.stdlib import ProcessorFormatter
from structlog.typing import Processor

_SHARED: tuple[Processor, ...] = (
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
)


def configure(stream: TextIO, json: bool | None = None, env: Mapping[str, str] = os.environ) -> None:
    """Log to ``stream`` from now on, from this process's every thread and library.

    ``json`` None means JSON unless the stream is a terminal; ``NO_COLOR`` in ``env`` is honoured. Calling it
    again replaces what it set up.
    """
    as_json = not stream.isatty() if json is None else json
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *_SHARED, ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_formatter(as_json, colors=stream.isatty() and not env.get("NO_COLOR")))
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h.formatter, ProcessorFormatter)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.INFO)


def _formatter(as_json: bool, colors: bool) -> ProcessorFormatter:
    # Tracebacks stay plain: the pretty ones print local variables, and those may hold credentials.
    look: list[Processor]
    if as_json:
        look = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        plain = structlog.dev.plain_traceback
        look = [structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=plain)]
    return ProcessorFormatter(
        foreign_pre_chain=[*_SHARED, structlog.stdlib.add_logger_name],
        processors=[ProcessorFormatter.remove_processors_meta, *look],
    )
