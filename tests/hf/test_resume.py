"""A checkpoint of Trainer is resumed with the stores and the loss that it was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from nemo_kd.data.resumed import FILE
from nemo_kd.errors import NemoKDError
from nemo_kd.hf import StoreCollator, StoreDataset, StoreLossMixin
from nemo_kd.loss import KDConfig, KDSchedule
from tests.hf import steps
from tests.hf.student import student, write_store


class StoreTrainer(StoreLossMixin, transformers.Trainer):
    pass


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_store(tmp_path / "store", [4, 1, 7, 2])


def trainer_of(
    run: Path, store: Path, config: KDConfig, *, subset: Sequence[int] | None = None, **more: Any
) -> StoreTrainer:
    """Of 4 steps, and a checkpoint after each second one."""
    data = StoreDataset(store, config, **more)
    often: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    return StoreTrainer(
        model=student(),
        args=transformers.TrainingArguments(**steps.arguments(run, **often)),
        data_collator=StoreCollator(data),
        train_dataset=data if subset is None else torch.utils.data.Subset(data, subset),
    )


def resume(run: Path, store: Path, config: KDConfig, **more: Any) -> StoreTrainer:
    """Continue after step 2."""
    trainer = trainer_of(run, store, config, **more)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    return trainer


@pytest.fixture
def run(tmp_path: Path, store: Path) -> Path:
    """A training that is complete, at alpha 0.9."""
    trainer_of(tmp_path / "run", store, KDConfig()).train()
    return tmp_path / "run"


def test_the_same_loss_and_stores_are_resumed(
    run: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default alpha is 0.9; a limit above the longest sample changes nothing."""
    for config in (KDConfig(), KDConfig(alpha=0.9), KDSchedule()):
        trainer = resume(run, store, config, max_seq_length=100)
        assert trainer.state.global_step == 4
    assert "not compared" not in capsys.readouterr().err


def test_another_loss_is_refused_by_name(run: Path, store: Path) -> None:
    message = (
        r"checkpoint-2 belongs to a run with other settings: alpha: 0.9 in the checkpoint, 0.0 now"
        r"; temperature: 1.0 in the checkpoint, 2.0 now. Restore them, train into another output_"
    )
    other = KDConfig(alpha=0.0, temperature=2.0)
    with pytest.raises(NemoKDError, match=message):
        resume(run, store, other)
    with pytest.raises(NemoKDError, match=r"checkpoint-4 belongs to a run.*; temperature: 1.0"):
        trainer_of(run, store, other).train(resume_from_checkpoint=True)
    with pytest.raises(NemoKDError, match=r"settings: alpha_end: None in the checkpoint, 0.1 now"):
        resume(run, store, KDSchedule(alpha_end=0.1))


def test_other_stores_are_refused(run: Path, store: Path, tmp_path: Path) -> None:
    other = write_store(tmp_path / "other", [4, 1, 7, 3])
    with pytest.raises(NemoKDError, match=r"other settings: stores: \['[0-9a-f]{64}'\] in the ch"):
        resume(run, other, KDConfig())
    with pytest.raises(NemoKDError, match=r"settings: longest_sample: 11 in the checkpoint, 8 now"):
        resume(run, store, KDConfig(), max_seq_length=8, over_long="truncate")
    with pytest.raises(NemoKDError, match=r"now; samples: 4 in the checkpoint, 3 now. Restore"):
        resume(run, store, KDConfig(), max_seq_length=8, over_long="drop")


def test_a_subset_of_a_store_is_compared_too(tmp_path: Path, store: Path) -> None:
    run = tmp_path / "run"
    trainer_of(run, store, KDConfig(), subset=[0, 2, 3]).train()
    resume(run, store, KDConfig(), subset=[0, 2, 3])
    with pytest.raises(NemoKDError, match="stores: "):
        other = write_store(tmp_path / "other", [4, 1, 7, 3])
        resume(run, other, KDConfig(), subset=[0, 2, 3])
    with pytest.raises(NemoKDError, match="settings: subset: "):
        resume(run, store, KDConfig(), subset=[0, 1, 3])


def test_a_checkpoint_without_the_file_is_resumed_with_a_line(
    run: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = run / "checkpoint-2"
    (checkpoint / FILE).unlink()
    assert resume(run, store, KDConfig(alpha=0.0)).state.global_step == 4
    line = f"{checkpoint} has no {FILE}, so data and loss were not compared with it"
    assert capsys.readouterr().err.count(line) == 1


def test_a_checkpoint_has_the_settings_of_its_own_training(run: Path, store: Path) -> None:
    """A training from the start may write over the checkpoints of another one."""
    trainer = trainer_of(run, store, KDConfig(alpha=0.5))
    trainer.train()
    trainer.train()
    resume(run, store, KDConfig(alpha=0.5))
    with pytest.raises(NemoKDError, match=r"alpha: 0.5 in the checkpoint, 0.9 now"):
        resume(run, store, KDConfig())
