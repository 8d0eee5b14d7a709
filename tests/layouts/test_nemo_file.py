"""NeMo's own configuration of a fine-tuning, as it is, in the product's training script."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import nemo_file
from tests.processes import TRAIN, run_program
from tests.runs import SAME_LINE, steps


def test_nemos_file_trains_with_a_store_added(
    tiny: Path, dump: Callable[..., Path], tmp_path: Path
) -> None:
    """Adapters, early stopping and the best model at the end are that file's own defaults."""
    arguments = [
        *("--config-path", str(nemo_file.write(tmp_path)), "--config-name", nemo_file.NAME),
        f"model.restore_from_path={tiny}/student.nemo",
        "+model.kd.alpha=0.5",
        f"+model.data.train_ds.store={dump()}",
        f"+model.data.validation_ds.store={dump(split='heldout')}",
        f"exp_manager.explicit_log_dir={tmp_path}/run",
        "trainer.precision=32",
        "trainer.max_steps=3",
        "model.global_batch_size=4",
        "model.micro_batch_size=2",
    ]
    working = tmp_path / "working"
    working.mkdir()
    run_program(TRAIN, *arguments, cwd=working, fork=True)
    lines = steps(tmp_path / "run")
    assert len(lines) == 3
    for step in lines:
        mean = (step["sft_loss"] + step["kd_loss"]) / 2
        assert step["loss"] == pytest.approx(mean, abs=SAME_LINE)
    saved = tmp_path / "run/checkpoints/megatron_gpt_peft_adapter_tuning.nemo"
    assert saved.is_file() and not list(working.iterdir())
