"""A training whose loss stays NaN ends with an error, and NaN weights are not saved."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from nemo_kd.errors import NemoKDError
from nemo_kd.hf import StoreCollator, StoreDataset
from nemo_kd.hf.finite import refuse_weights_not_finite
from nemo_kd.loss import KDConfig
from tests.hf import steps
from tests.hf.student import expected, student, write_store

DIVERGES: dict[str, Any] = {"learning_rate": 1e30}  # the loss is NaN from step 2 on


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_store(tmp_path / "store", [4, 1, 7, 2])


def trainer_of(run: Path, store: Path, model: Any = None, **args: Any) -> steps.StoreTrainer:
    data = StoreDataset(store, KDConfig())
    return steps.StoreTrainer(
        model=model or student(),
        args=transformers.TrainingArguments(**steps.arguments(run, **args)),
        data_collator=StoreCollator(data),
        train_dataset=data,
        eval_dataset=data,
    )


@pytest.mark.parametrize("hides", [True, False])
@pytest.mark.parametrize(
    ("last", "logged", "ends"),
    [(20, 1, 6), (20, 500, 10), (3, 1, 3), (3, 500, 3)],
)
def test_a_loss_that_stays_nan_ends_the_training(
    tmp_path: Path,
    store: Path,
    capsys: pytest.CaptureFixture[str],
    last: int,
    logged: int,
    ends: int,
    hides: bool,
) -> None:
    """After five steps, read where Trainer logs or after ten; of two if they are the last ones."""
    args = {"max_steps": last, "logging_steps": logged, "logging_nan_inf_filter": hides}
    trainer = trainer_of(tmp_path, store, **DIVERGES, **args)
    with pytest.raises(NemoKDError, match=r"loss is not finite from step 2 on.*learning_rate"):
        trainer.train()
    assert trainer.state.global_step == ends
    assert capsys.readouterr().err.count("WARNING: the loss of step 2 is nan") == 1
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert all(map(math.isnan, losses[1:]))
    assert logged > 1 or (math.isfinite(losses[0]) and len(losses) > 1)


def test_a_last_step_that_spoils_the_weights_is_refused(tmp_path: Path, store: Path) -> None:
    with pytest.raises(NemoKDError, match="weights of the model are NaN or infinite, such as mode"):
        trainer_of(tmp_path, store, **DIVERGES, max_steps=2).train()


def test_no_checkpoint_has_weights_that_are_nan(tmp_path: Path, store: Path) -> None:
    often = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    trainer = trainer_of(tmp_path, store, **DIVERGES, **often)
    with pytest.raises(NemoKDError, match="weights of the model are NaN"):
        trainer.train()
    assert [one.name for one in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    with pytest.raises(NemoKDError, match="weights of the model are NaN"):
        trainer.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()


def test_only_trained_weights_must_be_finite() -> None:
    model = student()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.inf
    with pytest.raises(NemoKDError, match=r"such as lm_head\.weight"):
        refuse_weights_not_finite(model)
    model.lm_head.weight.requires_grad_(False)
    refuse_weights_not_finite(model)


class Overflow(transformers.TrainerCallback):
    """Make the logits NaN in step 2, and leave its gradient out, as float16's loss scaling does."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        def spoil(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
            return logits * (math.nan if state.global_step == 1 else 1)

        self.hook = given["model"].lm_head.register_forward_hook(spoil)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.hook.remove()
        for parameter in given["model"].parameters():
            parameter.grad.nan_to_num_(0)


@pytest.mark.parametrize("hides", [True, False])
def test_one_step_that_overflows_is_logged_and_those_after_it_have_their_loss(
    tmp_path: Path, store: Path, hides: bool
) -> None:
    still = {"learning_rate": 0.0, "max_steps": 4, "logging_nan_inf_filter": hides}
    trainer = trainer_of(tmp_path, store, **still)
    trainer.add_callback(Overflow())
    trainer.train()
    value, _ = expected(KDConfig(), store)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert math.isnan(losses[1])
    assert [losses[0], *losses[2:]] == pytest.approx([value] * 3, abs=1e-4)
