"""How a wait is ended from another thread. Owns that signal; knows nothing of what waits."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


class Stop:
    """Set once, for good; until then it does nothing."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._end: Callable[[], object] | None = None

    def set(self) -> None:
        """End what is under way, and what begins later at once."""
        with self._lock:
            self._event.set()
            end = self._end
        if end is not None:
            end()

    def is_set(self) -> bool:
        return self._event.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Whether it was set before the time is over."""
        return self._event.wait(timeout_s)

    @contextlib.contextmanager
    def ends(self, end: Callable[[], object]) -> Iterator[None]:
        """``set`` calls ``end`` while the block runs."""
        with self._lock:
            self._end = end
        if self._event.is_set():
            end()
        try:
            yield
        finally:
            with self._lock:
                self._end = None
