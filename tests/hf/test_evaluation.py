"""An evaluation has each answer token of its data once, and a training has at least a batch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.data import Subset

from nemo_kd.errors import NemoKDError
from nemo_kd.hf import StoreCollator, StoreDataset
from nemo_kd.loss import KDConfig
from nemo_kd.store import StoreError
from tests.hf import steps
from tests.hf.student import ANSWERS, expected, student, write_store
from tests.processes import run_program

DROPS: dict[str, Any] = {"dataloader_drop_last": True}
SPLIT, DISPATCH = {"split_batches": True}, {"dispatch_batches": True}
RUNS: dict[str, dict[str, Any]] = {
    "apart": {"per_device_eval_batch_size": 2},  # 7 samples: 4, then 2 and 1
    "all repeated": {"per_device_eval_batch_size": 8},  # the second process has none of its own
    "drop_last": {"per_device_eval_batch_size": 2, "per_device_train_batch_size": 2, **DROPS},
    "split": {"per_device_eval_batch_size": 4, "accelerator_config": SPLIT},
    "dispatched": {
        "per_device_eval_batch_size": 2,
        "accelerator_config": DISPATCH,
        "pad_to": 16,
    },
    "dispatched and split": {
        "per_device_eval_batch_size": 4,
        "accelerator_config": {**SPLIT, **DISPATCH},
        "pad_to": 16,
    },
}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_store(tmp_path / "store", [*ANSWERS, 6])


def trainer_of(run: Path, data: StoreDataset, train: Any = None, **args: Any) -> Any:
    return steps.StoreTrainer(
        model=student(),
        args=transformers.TrainingArguments(**steps.arguments(run, **args)),
        data_collator=StoreCollator(data),
        train_dataset=data if train is None else train,
        eval_dataset=data,
    )


def test_two_processes_evaluate_each_sample_once(store: Path, tmp_path: Path) -> None:
    """Whose number is no multiple of a batch: accelerate repeats samples to fill the last one."""
    given = {name: {"average_tokens_across_devices": True, **run} for name, run in RUNS.items()}
    program = "tests/hf/steps.py"
    run_program(program, tmp_path, store, "{}", json.dumps(given), processes=2, fork=True)
    for name in RUNS:
        result = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        wanted, _ = expected(KDConfig(), store, weights=result["weights"])
        assert result["eval"]["eval_loss"] == pytest.approx(wanted, rel=1e-6), name


@pytest.mark.parametrize("size", [3, 8])
def test_drop_last_drops_no_sample_of_an_evaluation(store: Path, tmp_path: Path, size: int) -> None:
    """Of 7 samples it would drop one, or all."""
    data = StoreDataset(store, KDConfig())
    trainer = trainer_of(tmp_path, data, per_device_eval_batch_size=size, **DROPS)
    wanted, _ = expected(KDConfig(), store)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted, rel=1e-6)
    assert trainer.predict(data).metrics["test_loss"] == pytest.approx(wanted, rel=1e-6)
    assert trainer.args.dataloader_drop_last


def test_a_training_without_a_batch_is_refused(store: Path, tmp_path: Path) -> None:
    data = StoreDataset(store, KDConfig())
    trainer = trainer_of(tmp_path, data, **DROPS)  # batches of 8
    with pytest.raises(NemoKDError, match="train_dataset has 7 samples, too few for a batch of 8 "):
        trainer.train()
    with pytest.raises(NemoKDError, match="train_dataset has no samples"):
        trainer_of(tmp_path, data, Subset(data, [])).train()
    trainer = trainer_of(tmp_path, data, per_device_train_batch_size=7, **DROPS)
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_training_without_a_step_is_refused(store: Path, tmp_path: Path) -> None:
    data = StoreDataset(store, KDConfig())
    with pytest.raises(NemoKDError, match="max_steps=0: Trainer would train num_train_epochs=3"):
        trainer_of(tmp_path, data, max_steps=0).train()
    with pytest.raises(NemoKDError, match="num_train_epochs=0: nothing would be trained"):
        trainer_of(tmp_path, data, max_steps=-1, num_train_epochs=0).train()


def test_an_evaluation_without_answer_tokens_has_no_loss(tmp_path: Path) -> None:
    """0 would be the best loss of a training."""
    data = StoreDataset(write_store(tmp_path / "store", [4, 0, 2]), KDConfig())
    trainer = trainer_of(tmp_path, data)
    found = trainer.evaluate(Subset(data, [1]))
    assert all(math.isnan(found[f"eval_{name}"]) for name in ("loss", "sft_loss", "kd_loss"))
    with pytest.raises(NemoKDError, match="eval_dataset has no samples"):
        trainer.evaluate(Subset(data, []))
    with pytest.raises(NemoKDError, match="test_dataset has no samples"):
        trainer.predict(Subset(data, []))


def test_a_step_without_answer_tokens_has_no_loss_and_does_not_end_the_training(
    tmp_path: Path,
) -> None:
    data = StoreDataset(write_store(tmp_path / "store", [0, 0, 3]), KDConfig())
    trainer = trainer_of(tmp_path, data, Subset(data, [0, 1]), max_steps=6)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 6 and all(map(math.isnan, losses))
    after = trainer.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_store_without_answer_tokens_is_refused(tmp_path: Path) -> None:
    empty = write_store(tmp_path / "empty", [0, 0])
    full = write_store(tmp_path / "full", [0, 1])
    for stores in (empty, [full, empty]):
        with pytest.raises(StoreError, match="empty has no answer tokens, so nothing to learn"):
            StoreDataset(stores, KDConfig())
    assert len(StoreDataset(full, KDConfig())) == 2
