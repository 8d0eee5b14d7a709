"""The results of an evaluation: those of every set, and NeMo's metric of generated answers."""

from __future__ import annotations

import pytest

from nemo_kd.errors import NemoKDError
from nemo_kd.nemo.train import measured

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
