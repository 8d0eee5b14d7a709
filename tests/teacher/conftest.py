"""Hugging Face teachers, their dumps and answers, made once for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Shared
from tests.processes import run_program

SETTINGS = [
    "data.max_seq_length=128",
    "trainer.precision=32",
    "model.micro_batch_size=3",
    "rows_per_shard=4",
    "rows_per_lm_head=50",
    "dump.top_k=20",
    "dump.temperatures=[1.0,2.0]",
]


@pytest.fixture(scope="session")
def world(shared: Shared) -> Path:
    """The output of `world.py`: checkpoints, data, stores, `parity.json`."""
    program = "tests/teacher/world.py"
    return shared("hf", lambda path: run_program(program, path, *SETTINGS, fork=True))
