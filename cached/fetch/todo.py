"""The files that a fetch has still to begin, when another fetch may be after the same contents.

Owns their order, and what is known of each content that was asked about: that it is this fetch's, another's,
or in the store by now. Before a file whose digest is known is begun, the pool is asked whether it may be;
what another fetch has in hand is left to it and taken up when that is told. Nobody waits for another before
everything of its own is begun, so that fetches cannot wait for each other in a circle.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from cached.fetch.wire import Have, Taken, Yours
from cached.model import Blob, Digest


class Todo:
    """For several threads. ``ask`` puts the question to the pool; None where nobody else fetches."""

    def __init__(self, ask: Callable[[Digest], None] | None = None) -> None:
        self._ask = ask
        self._changed = threading.Condition()
        self._files: deque[tuple[int, Digest | None]] = deque()
        self._ready: deque[tuple[int, Blob | None]] = deque()
        self._mine: set[Digest] = set()
        self._asked: dict[Digest, list[int]] = {}
        self._taken: dict[Digest, list[int]] = {}
        self._closed = False

    def add(self, index: int, digest: Digest | None) -> None:
        """Before any thread takes."""
        self._files.append((index, digest))

    def __len__(self) -> int:
        return len(self._files)

    def take(self) -> tuple[int, Blob | None] | None:
        """The next file, with its blob where that is in the store by now; None once there is no more."""
        asked: Digest | None = None
        while True:
            with self._changed:
                # One question at a time for each thread: what is not begun soon is left to others.
                while not self._closed and not self._ready and (not self._files or asked in self._asked):
                    if not (self._files or self._asked or self._taken):
                        break
                    self._changed.wait()
                if self._closed or not (self._ready or self._files):
                    self._changed.notify_all()
                    return None
                if self._ready:
                    return self._ready.popleft()
                index, digest = self._files.popleft()
                if digest is None or self._ask is None or digest in self._mine:
                    return index, None
                if not self._put_aside(index, digest):
                    continue
                asked = digest
            self._ask(digest)

    def _put_aside(self, index: int, digest: Digest) -> bool:
        """Until it is known whose it is. Whether that is still to be asked."""
        known = self._asked if digest in self._asked else self._taken if digest in self._taken else None
        if known is not None:
            known[digest].append(index)
            return False
        self._asked[digest] = [index]
        return True

    def hear(self, order: Yours | Taken | Have) -> None:
        """The answer to a question, or what became of a content that was another's."""
        with self._changed:
            match order:
                case Taken(digest=digest):
                    self._taken[digest] = self._asked.pop(digest, [])
                case Yours(digest=digest):
                    self._mine.add(digest)
                    self._ready.extend((index, None) for index in self._put_back(digest))
                case Have(blob=blob):
                    self._ready.extend((index, blob) for index in self._put_back(blob.sha256))
            self._changed.notify_all()

    def _put_back(self, digest: Digest) -> list[int]:
        return self._asked.pop(digest, []) + self._taken.pop(digest, [])

    def close(self) -> None:
        """Nobody goes on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
