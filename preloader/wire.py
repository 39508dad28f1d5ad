"""What the keeper of a GPU and its filler say to each other, over a socket pair with the framing of ``fds``.

Owns the messages' form and bounds, a blob's layout as JSON, and how a problem travels. Moves nothing itself.

The keeper asks for one job at a time::

    {"do": "load", "id": ARTIFACT, "have": [sha256, …]}      (what it has sealed already)
    {"do": "prove", "layout": {"blobs": […], …}}             and the blocks' descriptors, in that order

The filler answers with ``{"progress": [bytes done, bytes in all]}`` now and then, with ``{"sealed": layout of
a blob}`` and a descriptor for each of its blocks once it is filled and proven, and ends the job with
``{"done": true}`` (after a load also ``granularity``, and ``blobs``: the sha256 of every blob that has
tensors, in the layout's order) or with ``{"error": …}``.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cached import fds
from cached.model import Digest, ErrorKind, Problem, is_digest

MAX_MESSAGE_BYTES = 256 * 1024 * 1024
"""As large as the largest manifest: a layout names every tensor."""


@dataclass(frozen=True, slots=True)
class BlobLayout:
    """Where one blob's tensors lie in its image, and what was copied there.

    ``blocks`` are sizes in bytes; ``tensors`` (name, offset in the image, bytes) in the order of the file,
    where the first begins at byte ``begins_at`` and each follows on the one before. ``digests`` are the
    xxh3_128 of what each tensor has in each chunk of the file, in the order of the file.
    """

    sha256: Digest
    blocks: tuple[int, ...]
    begins_at: int
    tensors: tuple[tuple[str, int, int], ...]
    digests: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "sha256": self.sha256,
            "blocks": self.blocks,
            "begins_at": self.begins_at,
            "tensors": self.tensors,
            "digests": self.digests,
        }


def parse_layout(entry: dict[str, Any]) -> BlobLayout:
    """The opposite of ``to_json``. Raises ValueError for what is none."""
    try:
        layout = BlobLayout(
            Digest(entry["sha256"]),
            tuple(map(_natural, entry["blocks"])),
            _natural(entry["begins_at"]),
            tuple((str(name), _natural(offset), _natural(size)) for name, offset, size in entry["tensors"]),
            tuple(map(str, entry["digests"])),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"a layout is malformed ({error!r})") from error
    end = sum(layout.blocks)
    if not is_digest(layout.sha256) or any(offset + size > end for _, offset, size in layout.tensors):
        raise ValueError(f"a layout of {end} bytes has a tensor beyond its end, or no digest for a name")
    return layout


def send(sock: socket.socket, message: dict[str, Any], blocks: Sequence[int] = ()) -> None:
    """Raises OSError when the other end is gone, or takes nothing for as long as the socket's timeout."""
    fds.send(sock, message, tuple(blocks), most_bytes=MAX_MESSAGE_BYTES)


def receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """A message and its descriptors, which the caller owns. Raises OSError, and FramingError at the end."""
    return fds.receive(sock, most_bytes=MAX_MESSAGE_BYTES)


def problem_to_json(problem: Problem) -> dict[str, str | float | None]:
    return {
        "kind": problem.kind.value,
        "reason": problem.reason,
        "message": problem.message,
        "hint": problem.hint,
        "retry_after_s": problem.retry_after_s,
    }


def parse_problem(entry: dict[str, Any]) -> Problem:
    """The opposite of ``problem_to_json``. Raises ValueError for what is none."""
    try:
        retry = entry["retry_after_s"]
        return Problem(
            ErrorKind(entry["kind"]),
            str(entry["reason"]),
            str(entry["message"]),
            str(entry["hint"]),
            None if retry is None else float(retry),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"an error is malformed ({error!r})") from error


def _natural(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no size")
    return value
