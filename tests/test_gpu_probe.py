"""The probe of a GPU, on the fake one: each step comes to its end, and tells lost memory from kept memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gpukit

PROBE = Path(__file__).parent.parent / "benchmarks" / "gpu_probe.py"


def test_the_probe_answers_its_questions_on_the_fake() -> None:
    with gpukit.machine() as gpus:
        gpus.add(total_bytes=64 * gpukit.MIB)
        gpus.fail("cuMemHostRegister", "CUDA_ERROR_NOT_SUPPORTED", times=1)
        steps = "memory,outliving,copying"  # all of them take too long for this
        done = subprocess.run(
            [sys.executable, str(PROBE), "--quick", "--dev-dir", str(gpus.dev), "--steps", steps],
            env=gpus.env({name: value for name, value in os.environ.items() if name != "PYTHONPATH"}),
            capture_output=True,
            text=True,
        )
        lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stdout + done.stderr
    assert [step["ok"] for step in lines[-1]["summary"].values()] == [True] * 3
    kept, lost = (line for line in lines if line.get("step") == "outliving")
    assert (kept["same"], kept["used_after_close"]) == (True, 0)
    assert (lost["same"], lost["take"]) == (False, "CUDA_ERROR_INVALID_VALUE")
    assert {
        "step": "copying",
        "what": "register anonymous pages",
        "error": "CUDA_ERROR_NOT_SUPPORTED",
    } in lines
