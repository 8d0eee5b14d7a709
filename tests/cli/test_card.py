"""The model card of a student names the settings that its training had, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_kd.checkpoints.card import model_card
from nemo_kd.checkpoints.source import Source
from nemo_kd.cli.export import card_of


@pytest.mark.parametrize(
    ("kd", "named", "absent"),
    [
        ({}, ["kd.alpha | 0.9", "kd.temperature | 1"], ["schedule", "beta", "skew", "_end"]),
        (
            {"alpha_end": 0.1, "schedule": "cosine", "schedule_steps": 50},
            ["kd.alpha_end | 0.1", "kd.schedule | cosine", "kd.schedule_steps | 50"],
            ["temperature_end"],
        ),
        ({"divergence": "jsd", "beta": 0.2}, ["kd.beta | 0.2"], ["skew"]),
        ({"divergence": "skew_forward_kl"}, ["kd.skew | 0.1"], ["beta"]),
    ],
)
def test_a_card_names_the_settings_in_effect(
    tmp_path: Path, kd: dict[str, Any], named: list[str], absent: list[str]
) -> None:
    data = {"train_ds": {"store": ["somewhere"]}}
    section = {"data": data, "kd": kd, "kd_trained_steps": 6}
    source = Source(tmp_path / "kd.nemo", None, section, None)  # type: ignore[arg-type]
    text = model_card(card_of(source), source, {})
    assert all(each in text for each in named)
    assert not any(each in text for each in absent)
