"""`model.kd` of a training run: its own settings, and what a schedule makes of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_kd.errors import NemoKDError
from nemo_kd.loss import KDConfig
from nemo_kd.nemo.config import KDTrainingConfig, kd_training_config


def test_without_a_schedule_nothing_changes() -> None:
    kd = KDTrainingConfig(alpha=0.3)
    assert kd.at(7, 10) is kd and kd.end is kd and kd.distils


def test_alpha_goes_linearly_to_its_end_and_stays() -> None:
    kd = KDTrainingConfig(alpha=0.9, alpha_end=0.1, schedule_steps=8)
    weights = [kd.at(step, 100).weights for step in (0, 2, 4, 8, 50)]
    assert [kd_weight for _, kd_weight in weights] == pytest.approx([0.9, 0.7, 0.5, 0.1, 0.1])
    assert [sum(pair) for pair in weights] == pytest.approx([1.0] * 5)
    assert kd.end == kd.at(8, 100) and not kd.end.scheduled


def test_the_run_is_the_schedule_where_no_steps_are_given() -> None:
    kd = KDTrainingConfig(alpha=0.0, alpha_end=1.0)
    assert [kd.at(step, 4).weights[1] for step in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert kd.distils and kd.end.weights == (0.0, 1.0)


def test_cosine_is_half_a_wave() -> None:
    kd = KDTrainingConfig(support="topk", temperature=4, temperature_end=1, schedule="cosine")
    found = [kd.at(step, 10).temperature for step in range(11)]
    assert found == pytest.approx([2.5 + 1.5 * math.cos(math.pi * t / 10) for t in range(11)])
    assert {kd.at(step, 10).weights for step in range(11)} == {KDConfig().weights}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha_end": 1.5}, r"model.kd.alpha_end is 1.5: expected a value in \[0, 1\]"),
        ({"kd_weight": 1.0, "alpha_end": 0.5}, "use alpha instead of sft_weight and kd_weight"),
        ({"temperature_end": 2.0}, "model.kd.temperature_end needs support topk or vocab"),
        (
            {"support": "topk", "temperature_end": 0.0},
            "temperature_end is 0.0: expected a value > 0",
        ),
        ({"alpha_end": 0.5, "schedule": "cosin"}, "Did you mean 'cosine'?"),
        ({"schedule_steps": 0}, "schedule_steps is 0: expected at least 1"),
        (
            {"normalize": "tokens"},
            "model.kd.normalize is 'tokens': expected one of global_tokens, microbatch",
        ),
        ({"normalize": "tokens"}, "Did you mean 'global_tokens'?"),
        ({"alpha_ende": 0.5}, "did you mean model.kd.alpha_end?"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(NemoKDError, match=message):
        kd_training_config(OmegaConf.create(settings))
