"""Triton's kernels under its interpreter: the arithmetic is tested here, the speed is a GPU's."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.conftest import ROOT


@pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: pip install triton"
)
def test_kernels_equal_torchs() -> None:
    # The interpreter is chosen when triton is imported: so in a process of its own.
    done = subprocess.run(
        [sys.executable, "-m", "tests.loss.triton_checks"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
