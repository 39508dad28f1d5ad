"""The log: one JSON object a line, a readable form on a terminal, libraries' lines included."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
import structlog

from cached import log


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Logging belongs to the process, so each test gives it back."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_is_json_with_time_level_event_and_what_was_bound() -> None:
    stream = io.StringIO()
    log.configure(stream)
    structlog.get_logger().bind(lease="l1").info("granted", artifact="sha256:ab", size_bytes=3)
    (line,) = lines(stream)
    assert datetime.fromisoformat(line.pop("timestamp")).utcoffset() == timedelta(0)
    assert line == {
        "level": "info",
        "event": "granted",
        "lease": "l1",
        "artifact": "sha256:ab",
        "size_bytes": 3,
    }


def test_libraries_lines_look_the_same() -> None:
    stream = io.StringIO()
    log.configure(stream)
    logging.getLogger("grpc").warning("lost %s of %d", "one", 2)
    (line,) = lines(stream)
    assert (line["event"], line["level"], line["logger"]) == ("lost one of 2", "warning", "grpc")
    assert "timestamp" in line


def test_a_traceback_stays_in_its_line_and_shows_no_variables() -> None:
    stream = io.StringIO()
    log.configure(stream)
    try:
        password = "hunter" + "2"
        raise ValueError(len(password))
    except ValueError:
        structlog.get_logger().exception("failed")
        logging.getLogger("library").exception("failed too")
    first, second = lines(stream)
    for line in (first, second):
        assert line["level"] == "error"
        assert "ValueError: 7" in line["exception"]
        assert "hunter2" not in line["exception"]


def test_debug_is_not_shown() -> None:
    stream = io.StringIO()
    log.configure(stream)
    structlog.get_logger().debug("noise")
    logging.getLogger("library").debug("noise")
    assert stream.getvalue() == ""


@pytest.mark.parametrize(("env", "coloured"), [({"NO_COLOR": "1"}, False), ({}, True)])
def test_a_terminal_gets_words(env: dict[str, str], coloured: bool) -> None:
    stream = Terminal()
    log.configure(stream, env=env)
    try:
        raise ValueError("why")
    except ValueError:
        structlog.get_logger().exception("granted", lease="l1")
    text = stream.getvalue()
    assert "granted" in text and "ValueError: why" in text
    assert not text.startswith("{")
    assert ("\x1b" in text) == coloured


@pytest.mark.parametrize(("stream", "as_json"), [(Terminal(), True), (io.StringIO(), False)])
def test_the_form_can_be_chosen(stream: io.StringIO, as_json: bool) -> None:
    log.configure(stream, json=as_json)
    structlog.get_logger().info("granted")
    assert stream.getvalue().startswith("{") == as_json


def test_configuring_again_replaces_the_stream() -> None:
    first, second = io.StringIO(), io.StringIO()
    log.configure(first)
    log.configure(second)
    structlog.get_logger().info("once")
    assert first.getvalue() == ""
    assert [line["event"] for line in lines(second)] == ["once"]
