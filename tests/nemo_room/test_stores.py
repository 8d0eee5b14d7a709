"""A store against a run's settings: its schedule, a store's own alpha, training and validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_kd.data import check_schedule
from nemo_kd.nemo.config import KDTrainingConfig
from nemo_kd.store import Store, StoreError
from tests.store.samples import spec, write


@pytest.fixture
def draws(tmp_path: Path) -> Store:
    return Store(write(tmp_path / "draws", spec(profile="sampled"), []))


@pytest.mark.parametrize(
    ("settings", "alpha", "named"),
    [
        ({"support": "vocab", "temperature_end": 2.0}, None, "temperature=2.0 at the end of the s"),
        ({"divergence": "jsd", "alpha": 0.0, "alpha_end": 0.5}, None, "divergence=jsd at the end"),
        ({"divergence": "jsd", "alpha": 0.0}, 0.5, "divergence=jsd;"),
    ],
)
def test_every_step_and_a_stores_own_alpha_count(
    draws: Store, settings: dict[str, Any], alpha: float | None, named: str
) -> None:
    with pytest.raises(StoreError) as refused:
        check_schedule(draws, KDTrainingConfig(**settings), alpha, naming="model.kd.{}".format)
    assert f"model.kd.{named}" in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "alpha"),
    [
        ({"alpha_end": 0.1, "normalize": "global_tokens", "fused_lm_head": True}, None),
        ({"divergence": "jsd"}, 0.0),
        ({"divergence": "jsd", "alpha": 0.0}, None),
    ],
)
def test_what_is_linear_or_not_learned_is_accepted(
    draws: Store, settings: dict[str, Any], alpha: float | None
) -> None:
    check_schedule(draws, KDTrainingConfig(**settings), alpha)
