"""What can be tested of `make gpu` and docs/gpu.md without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from benchmarks.gpu.predict import PAGE, RESULT, with_tables
from tests.processes import ROOT


def run(*module: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *module],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_page_has_the_predictions() -> None:
    page = PAGE.read_text()
    assert page == with_tables(page, json.loads(RESULT.read_text())), (
        "run python -m benchmarks.gpu.predict"
    )


def test_without_a_gpu_one_line_says_what_is_needed() -> None:
    done = run("benchmarks.gpu.run", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert done.stderr.startswith("error: make gpu needs ")
    assert done.stdout + done.stderr == done.stderr.splitlines()[0] + "\n"


def test_the_checks_pass_on_a_cpu() -> None:
    done = run("benchmarks.gpu.checks", "cpu", "small")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "9 cases agree with the float64 reference\n"


def test_what_is_timed_can_be_repeated() -> None:
    done = run("benchmarks.gpu.candidates", "cpu")
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    ours = [result for name, result in lines.items() if name.startswith("ours")]
    assert ours == ["done"] * 6, lines
