"""A store that the configured loss cannot learn from is refused, with the setting to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_kd.data import check_learnable
from nemo_kd.loss import KDConfig
from nemo_kd.store import Store, StoreError
from tests.store.samples import spec, write


def store(directory: Path, profile: str = "plain", top_k: int = 5) -> Store:
    return Store(write(directory, spec(profile=profile, top_k=top_k), []))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"divergence": "reverse_kl"}, "KDConfig.divergence=reverse_kl;"),
        ({"support": "topk"}, "KDConfig.support=topk;"),
        ({"top_entropy_fraction": 0.5}, "KDConfig.top_entropy_fraction=0.5;"),
        (
            {"support": "vocab", "temperature": 2.0, "top_entropy_fraction": 0.2},
            "KDConfig.temperature=2.0, KDConfig.top_entropy_fraction=0.2;",
        ),
    ],
)
def test_draws_in_a_loss_that_they_bias_are_refused(
    tmp_path: Path, settings: dict[str, Any], named: str
) -> None:
    config = KDConfig(**settings)
    with pytest.raises(StoreError) as refused:
        check_learnable(store(tmp_path / "draws", "sampled"), config)
    assert f"which it is not with {named} leave that at its default" in str(refused.value)
    check_learnable(store(tmp_path / "plain"), config)
    check_learnable(Store(tmp_path / "draws"), KDConfig(alpha=0.0, **settings))
    check_learnable(Store(tmp_path / "draws"), KDConfig(support="vocab", count_padding=True))


@pytest.mark.parametrize("profile", ["plain", "sampled"])
def test_one_id_on_support_topk_is_refused(tmp_path: Path, profile: str) -> None:
    one = store(tmp_path / "one", profile, top_k=1)
    with pytest.raises(
        StoreError, match=r"one id per token \(K = 1\).*set KDConfig.support=bucket"
    ):
        check_learnable(one, KDConfig(support="topk"))
    for config in (KDConfig(), KDConfig(support="vocab"), KDConfig(support="topk", alpha=0.0)):
        check_learnable(one, config)
