"""The loss's own tests with all of their tensors on the device, and under compute-sanitizer.

The tests make tensors without naming a device; `on_device` makes it the GPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu.on_device import VARIABLE
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.timing import Row

ROOT = Path(__file__).parents[2]
FILES = ("objective", "primitive", "supports", "weights", "divergences", "extremes")
NEED_HYPOTHESIS = {"divergences", "extremes"}
SECONDS = 240
"""Most for one command; a part's own limit may be shorter."""


def correct(sizes: Sizes) -> Iterator[Row]:
    """The checks against float64, then the kernels against plain torch."""
    checks = [sys.executable, "-m", "benchmarks.gpu.checks", sizes.device]
    small = ["small"] if sizes.device == "cpu" else []
    yield {"what": "against float64", **outcome([*checks, *small])}
    row: Row = {"what": "Triton against plain torch"}
    if sizes.device == "cpu":
        yield row | {"not run": "the kernels need a GPU"}
    else:
        yield row | outcome([*checks, "kernels"])


def tests(sizes: Sizes) -> Iterator[Row]:
    """The tests of `tests/loss`, a row for each file."""
    for name in FILES:
        row: Row = {"what": f"tests/loss/test_{name}.py"}
        if name in NEED_HYPOTHESIS and find_spec("hypothesis") is None:
            yield row | {"not run": "hypothesis is not installed"}
        elif sizes.device == "cuda" or name == FILES[0]:
            yield row | outcome(command(name), **{VARIABLE: sizes.device})


def command(name: str) -> list[str]:
    alone = ["--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts="]
    options = [*alone, "-p", "benchmarks.gpu.on_device", "-q", "--tb=line"]
    return [sys.executable, "-m", "pytest", *options, f"tests/loss/test_{name}.py"]


def sanitizer(sizes: Sizes) -> Iterator[Row]:
    """One small case under compute-sanitizer, for memory and for races."""
    program = shutil.which("compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        row: Row = {"what": f"compute-sanitizer, {tool}"}
        if program is None:
            yield row | {"not run": "compute-sanitizer is not on PATH"}
            continue
        checks = [sys.executable, "-m", "benchmarks.gpu.checks", sizes.device, "small"]
        yield row | outcome([program, "--tool", tool, "--error-exitcode", "3", *checks])


def outcome(command: list[str], **environment: str) -> Row:
    """{"result": the last line}; of a command that fails, "failed: " and its last lines."""
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return {"result": f"failed: no end after {SECONDS} s"}
    lines = (done.stdout if done.returncode == 0 else done.stdout + done.stderr).splitlines()
    if done.returncode == 0:
        return {"result": lines[-1] if lines else "no output"}
    return {"result": "failed: " + " ".join(lines[-4:])[-600:]}
