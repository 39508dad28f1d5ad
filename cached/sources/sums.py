"""SHA256SUMS: the listing and the expectation that an origin keeps beside its files.

Owns the format that ``sha256sum`` writes, and the checks on file names that keep an origin from
naming anything outside its folder. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from cached.model import MAX_FILES, CachedError, Digest, ErrorKind, check_relative_path, permanent

SUMS_NAME = "SHA256SUMS"
MAX_SUMS_BYTES = 8 * 1024 * 1024
"""Room for MAX_FILES lines with the longest names."""

_LINE = re.compile(r"(\\?)([0-9A-Fa-f]{64}) [ *](.+)")


def parse_sums(data: bytes, where: str) -> dict[str, Digest]:
    """Path to sha256, in path order. ``where`` goes into errors.

    Empty lines, comments (``#``) and an entry for SHA256SUMS itself are passed over, a leading ``./``
    is dropped. Raises CachedError: FAILED ``BAD_SHA256SUMS`` with the line, INVALID ``UNSAFE_PATH``.
    """
    if len(data) > MAX_SUMS_BYTES:
        raise _bad(where, f"it is larger than {MAX_SUMS_BYTES} bytes")
    sums: dict[str, Digest] = {}
    for number, line in enumerate(_text(data, where).split("\n"), 1):
        line = line.removesuffix("\r")
        if not line.strip() or line.startswith("#"):
            continue
        path, digest = _parse_line(line, f"line {number}", where)
        if path == SUMS_NAME:
            continue
        if path in sums:
            raise _bad(where, f"line {number} lists {path!r} a second time")
        sums[path] = digest
    check_names(sums, where)
    return dict(sorted(sums.items()))


def check_names(
    paths: Iterable[str], where: str, bad: Callable[[str, str], CachedError] | None = None
) -> None:
    """Refuse a set of paths that is empty, too large, unsafe, or has one path as file and as folder.

    ``bad`` makes the error from where and what, for a listing that is no SHA256SUMS.
    """
    bad = bad or _bad
    names = set(paths)
    if not names:
        raise permanent(
            ErrorKind.NOT_FOUND, "NO_FILES", f"{where} names no file", "put the model's files there"
        )
    if len(names) > MAX_FILES:
        raise bad(where, f"it names {len(names)} files, and {MAX_FILES} are the most")
    for path in names:
        check_relative_path(path)
        parts = path.split("/")
        for depth in range(1, len(parts)):
            if "/".join(parts[:depth]) in names:
                raise bad(where, f"{'/'.join(parts[:depth])!r} is both a file and the folder of {path!r}")


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _bad(where, f"it is not UTF-8: {error.reason} at byte {error.start}") from error


def _parse_line(line: str, place: str, where: str) -> tuple[str, Digest]:
    found = _LINE.fullmatch(line)
    if found is None:
        raise _bad(where, f"{place} is {line[:120]!r}, not a sha256, two spaces and a file name")
    escaped, digest, path = found.groups()
    if escaped:
        # sha256sum marks a line with a backslash when the name has one, or a line break, in it.
        path = path.replace("\\\\", "\0").replace("\\n", "\n").replace("\\r", "\r").replace("\0", "\\")
    return path.removeprefix("./"), Digest(digest.lower())


def _bad(where: str, what: str) -> CachedError:
    return permanent(
        ErrorKind.FAILED,
        "BAD_SHA256SUMS",
        f"{where}: {what}",
        f"write it anew: sha256sum -- * > {SUMS_NAME}, in the folder of the files",
    )
