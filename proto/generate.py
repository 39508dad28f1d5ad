"""Makes the committed stubs in cached/v1 and preloader/v1 from the proto files.

Owns those files' content and nothing else. ``python proto/generate.py`` writes them;
``--check`` writes nothing and fails when they are stale.
"""

from __future__ import annotations

import filecmp
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = sorted((ROOT / "proto").rglob("*.proto"))


def generate(out: Path) -> list[Path]:
    """Write every stub under ``out``; returns their paths relative to it."""
    arguments = [f"-I{ROOT / 'proto'}"]
    arguments += [f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    if protoc.main(["protoc", *arguments, *map(str, PROTOS)]) != 0:
        sys.exit("protoc failed; its message is above")
    return [path.relative_to(out) for path in sorted(out.rglob("*_pb2*.py*")) if path.is_file()]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = generate(Path(folder))
        stale = [p for p in made if not _same(Path(folder) / p, ROOT / p)]
        if "--check" in sys.argv[1:]:
            if stale:
                sys.exit(f"stale stubs, run 'make stubs': {', '.join(map(str, stale))}")
            return
        for path in stale:
            (ROOT / path).write_bytes((Path(folder) / path).read_bytes())
            print(path)


def _same(left: Path, right: Path) -> bool:
    return right.exists() and filecmp.cmp(left, right, shallow=False)


if __name__ == "__main__":
    main()
