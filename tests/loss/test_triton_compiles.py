"""Triton's kernels compiled for GPUs: what the assembler made of them, without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: pip install triton"
)
A100, H100, B200 = 80, 90, 100
MAX_REGISTERS = 48
"""5 blocks of 256 threads fit an SM's 65,536 registers: 40 of its 64 warps hide the latency."""


def compiled(capability: int, options: str) -> list[dict[str, Any]]:
    # In a process of its own: Triton's driver is chosen once, and is a GPU's in other tests.
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.compiled", str(capability), options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(kernel: dict[str, Any]) -> None:
    assert kernel["local_bytes"] == 0, kernel
    assert kernel["registers"] <= MAX_REGISTERS, kernel
    assert kernel["barriers"] == 0, kernel
    columns = {"128"} if kernel["shape"]["width"] % 16 == 0 else {"16", "32"}
    assert set(kernel["loads"]) <= columns, kernel
    assert set(kernel["stores"]) <= columns, kernel
    assert kernel["loads"], kernel
    assert bool(kernel["stores"]) == (kernel["kernel"] == "_backward_kernel"), kernel


@pytest.mark.parametrize(
    ("capability", "dtype"), [(A100, "float16"), (H100, "bfloat16"), (B200, "float32")]
)
def test_kernels_use_wide_loads_few_registers_and_no_local_memory(
    capability: int, dtype: str
) -> None:
    kernels = compiled(capability, dtype)
    assert {k["shape"]["width"] % 16 == 0 for k in kernels} == {True, False}
    assert {(k["kernel"], k["options"]["temperatures"]) for k in kernels} == {
        (name, t) for name in ("_forward_kernel", "_backward_kernel") for t in (1, 2)
    }
    for kernel in kernels:
        check(kernel)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [A100, H100, B200])
def test_all_combinations_of_the_options(capability: int) -> None:
    for kernel in compiled(capability, "all"):
        check(kernel)
