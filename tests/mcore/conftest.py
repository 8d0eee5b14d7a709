"""Teachers for Megatron-core: Hugging Face directories, and the same models as `.nemo`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_kd.checkpoints import open_checkpoint, write_nemo
from tests.checkpoints import models
from tests.conftest import Shared
from tests.processes import run_program
from tests.tiny import functions

ROWS = 9


def make(directory: Path) -> None:
    rows = [json.dumps(row) for row in functions()[:ROWS]]
    (directory / "train.jsonl").write_text("\n".join(rows) + "\n")
    for name in ("untied_llama3", "mixtral"):
        model = models.llama(name) if name in models.MODELS else models.family(name)
        source = models.save(model, directory / name)
        kept = range(model.config.num_hidden_layers)
        write_nemo(open_checkpoint(source), directory / f"{name}.nemo", kept)


@pytest.fixture(scope="session")
def teachers(shared: Shared) -> Path:
    """`NAME/` and `NAME.nemo` of a Llama and a mixture of experts, `train.jsonl`."""
    return shared("mcore-teachers", make)


@pytest.fixture(scope="session")
def megatron_lm(teachers: Path, shared: Shared) -> Path:
    """`mixtral/`: the same mixture of experts as Megatron-LM saves it, with its arguments."""

    def write(directory: Path) -> None:
        program = "tests/mcore/megatron_lm.py"
        run_program(program, directory / "mixtral", teachers / "mixtral", fork=True)

    return shared("mcore-megatron-lm", write)
