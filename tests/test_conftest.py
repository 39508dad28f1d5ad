"""The rule on skipped tests, in a run of pytest of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RULE = Path(__file__).with_name("conftest.py")
MARKED = "import pytest\n@pytest.mark.skipif(True, reason={!r})\ndef test_it(): pass\n"
CALLED = "import pytest\ndef test_it(): pytest.skip({!r})\n"
WHOLE = "import pytest\npytest.skip({!r}, allow_module_level=True)\n"


@pytest.mark.parametrize("how", [MARKED, CALLED, WHOLE], ids=["marked", "called", "whole-module"])
@pytest.mark.parametrize(("reason", "passes"), [("needs a GPU", True), ("only root can", False)])
def test_only_a_missing_gpu_is_a_reason_to_skip(tmp_path: Path, how: str, reason: str, passes: bool) -> None:
    (tmp_path / "conftest.py").write_text(RULE.read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    # One more, for a run without any test at all fails too.
    (tmp_path / "test_a.py").write_text(how.format(reason) + "\n")
    (tmp_path / "test_b.py").write_text("def test_it(): pass\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode == 0) is passes, done.stdout
    assert passes or reason in done.stdout
