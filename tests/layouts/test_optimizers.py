"""The optimizers that are not refused train, are saved and go on exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.layouts.conftest import train_overrides
from tests.layouts.test_train_resume import EXACT
from tests.processes import run_script
from tests.runs import steps


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_run_goes_on_exactly(
    dump: Callable[..., Path], tiny: Path, tmp_path: Path, name: str
) -> None:
    def train(directory: str, count: int) -> Path:
        run = tmp_path / directory
        overrides = [
            *train_overrides(tiny, dump(), dump(split="heldout"), run),
            f"model.optim.name={name}",
            "model.optim.sched=null",
            f"trainer.max_steps={count}",
        ]
        run_script("train_gpt_sft_kd.py", *overrides)
        return run

    whole = steps(train("whole", 6))
    train("again", 3)
    resumed = steps(train("again", 6))
    assert [line["step"] for line in resumed] == [1, 2, 3, 4, 5, 6]
    for line, expected in zip(resumed, whole, strict=True):
        assert {key: line[key] for key in EXACT} == {key: expected[key] for key in EXACT}
