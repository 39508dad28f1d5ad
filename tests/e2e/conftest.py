"""Fixtures of the end-to-end tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from kit import NodeKit, running_node

from benchmarks.origin import Origin


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeKit]:
    """A node with a daemon and a preloader, on empty directories and without any configuration."""
    with running_node(tmp_path) as running:
        yield running


@pytest.fixture
def cold_node(tmp_path: Path) -> Iterator[NodeKit]:
    """A node on which nothing runs yet."""
    node = NodeKit(tmp_path)
    yield node
    node.close()


@pytest.fixture
def origin(tmp_path: Path) -> Iterator[Origin]:
    """An HTTP origin that serves ``tmp_path / "origin"``."""
    root = tmp_path / "origin"
    root.mkdir()
    with Origin(root) as running:
        yield running
