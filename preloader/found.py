"""What the inventory tells the preloader's parent of GPUs and MIG instances, as lines of JSON.

Owns the record and its form, so that the parent knows devices without knowing NVML. Asks nobody.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class Found:
    """One device. A MIG instance has the ``index`` and ``minor`` of its GPU, which ``parent_uuid`` names.

    Bytes are as NVML reports them. ``marked``: the reason is of an event or a count, not to be seen again.
    """

    uuid: str
    index: int
    name: str
    minor: int
    total_bytes: int
    used_bytes: int
    free_bytes: int
    unfit_reason: str = ""
    marked: bool = False
    parent_uuid: str = ""


def to_line(found: list[Found] | str) -> str:
    """Every device, or why there is no NVML."""
    words: object = {"missing": found} if isinstance(found, str) else [asdict(device) for device in found]
    return json.dumps(words)


def parse_line(line: bytes) -> list[Found] | str:
    """The opposite. Raises ValueError."""
    words = json.loads(line)
    if isinstance(words, dict):
        return str(words.get("missing"))
    if not isinstance(words, list):
        raise ValueError(f"neither devices nor the want of them: {line[:100]!r}")
    try:
        return [_parse(entry) for entry in words]
    except (KeyError, TypeError) as error:
        raise ValueError(f"a device is malformed ({error!r}): {line[:100]!r}") from error


def is_uuid(text: str) -> bool:
    """Drivers before 470 name instances otherwise, with slashes."""
    return re.fullmatch(r"(GPU|MIG)-[0-9A-Za-z-]{1,60}", text) is not None


def _parse(entry: dict[str, Any]) -> Found:
    found = Found(**{field.name: entry[field.name] for field in fields(Found)})
    if not is_uuid(found.uuid):  # it is made part of a path
        raise ValueError(f"{found.uuid!r} is not a device's UUID")
    return found
