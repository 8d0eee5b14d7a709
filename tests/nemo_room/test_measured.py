"""What a validation measures: the weights of its loss, the results that an evaluation writes."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_kd.errors import NemoKDError
from nemo_kd.nemo.train import alpha_of_validation, measured

LOSSES = {"val/a/loss": 1.0, "val_loss": 1.0, "validation_loss": 1.0, "validation_loss_a": 1.0}


def test_losses_are_those_of_the_sets() -> None:
    assert measured(LOSSES, "loss") == measured(LOSSES, None) == {"a/loss": 1.0}


def test_a_metric_of_generated_answers_is_kept() -> None:
    """Under the names of NeMo's `MegatronGPTSFTModel._determine_log_key`."""
    rouge = {"validation_rouge": 0.1, "validation_rouge_a_rouge1_fmeasure": 0.2}
    expected = {"a/loss": 1.0, "rouge": 0.1, "rouge_a_rouge1_fmeasure": 0.2}
    assert measured({**LOSSES, **rouge}, "rouge") == expected


def test_no_results_are_an_error() -> None:
    with pytest.raises(NemoKDError, match="nothing was measured: no sample"):
        measured({"val_loss": float("nan")}, "loss")


@pytest.mark.parametrize(
    ("kd", "alphas", "says"),
    [
        ({"alpha": 0.9}, None, False),
        ({"alpha": 0.9}, [None, 0.9], False),
        ({"alpha": 0.9}, [None, 0.5], True),
        ({}, [0.9, 0.9], False),  # the default
        ({"alpha": 0.9, "alpha_end": 0.1}, [0.9, None], True),  # the schedule's end counts
        ({"alpha": 0.9, "alpha_end": 0.1}, [0.1, None], False),
    ],
)
def test_another_alpha_in_training_than_in_validation_loss_is_said(
    kd: dict[str, Any], alphas: list[float | None] | None, says: bool
) -> None:
    train_ds = {"store": ["a", "b"], "alpha": alphas}
    data = {"train_ds": train_ds, "validation_ds": {"store": "c"}}
    cfg = OmegaConf.create({"trainer": {}, "model": {"kd": kd, "data": data}})
    notice = alpha_of_validation(cfg)
    assert bool(notice) == says
    if says:
        assert notice.startswith(f"validation_loss has alpha={kd.get('alpha_end', 0.9)}, ")
    cfg.model.data.validation_ds.store = None
    assert alpha_of_validation(cfg) == ""
