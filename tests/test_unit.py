"""`make test-unit` has neither NeMo nor process groups, in its tests and in what they start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT, environment

NEEDY = """
import subprocess, sys

def test_nemo():
    import nemo

def test_megatron_in_a_child():
    subprocess.run([sys.executable, "-c", "import megatron.core"], check=True)

def test_group():
    import torch.distributed as dist
    dist.init_process_group("gloo", init_method="file:///nowhere", rank=0, world_size=1)

def test_no_need():
    import torch
"""


def test_needs_that_no_mark_tells_fail(tmp_path: Path) -> None:
    file = tmp_path / "test_needy.py"
    file.write_text(NEEDY)
    hidden = os.pathsep.join([str(ROOT / "tests/without_nemo"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", str(file)],
        env=environment() | {"PYTHONPATH": hidden},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "3 failed, 1 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("mark", ["not nemo", "tests/without_nemo"])
def test_the_makefile_asks_for_it(mark: str) -> None:
    recipe = (ROOT / "Makefile").read_text().partition("\ntest-unit:")[2].partition("\n\n")[0]
    assert mark in recipe
