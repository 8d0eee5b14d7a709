"""A store that the configured loss cannot learn from is refused, with the setting to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_kd.data import StoreFacts, check_learnable, check_schedule
from nemo_kd.data.learnable import check_stores
from nemo_kd.errors import NemoKDError
from nemo_kd.loss import KDConfig, KDSchedule
from nemo_kd.store import Store, StoreError
from tests.store.samples import spec, write


def store(directory: Path, profile: str = "plain", top_k: int = 5) -> Store:
    return Store(write(directory, spec(profile=profile, top_k=top_k), []))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"divergence": "reverse_kl"}, "KDConfig.divergence=reverse_kl;"),
        ({"support": "topk"}, "KDConfig.support=topk;"),
        ({"support": "vocab", "temperature": 2.0}, "KDConfig.temperature=2.0;"),
        (
            {"support": "topk", "divergence": "jsd"},
            "KDConfig.support=topk, KDConfig.divergence=jsd;",
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


@pytest.mark.parametrize("weights", [{"sft_weight": 1.0, "kd_weight": 4.0}, {"kd_weight": 4.0}])
def test_an_alpha_of_a_store_beside_weights_is_refused(
    tmp_path: Path, weights: dict[str, Any]
) -> None:
    """Tokens of this store would have weights that sum to 1, those of others (1, 4)."""
    one, config = store(tmp_path / "one"), KDConfig(**weights)
    with pytest.raises(NemoKDError, match=r"alpha=0.5 gives store .*/one weights of its own") as no:
        check_schedule(one, config, 0.5)
    assert "use KDConfig.alpha for the others, not KDConfig.sft_weight and" in str(no.value)
    check_schedule(one, config)
    check_schedule(one, KDConfig(alpha=0.9), 0.5)


def test_a_schedule_of_alpha_that_no_store_follows_is_refused(tmp_path: Path) -> None:
    of = store(tmp_path / "one").spec
    schedule = KDSchedule(alpha=0.9, alpha_end=0.1)
    own = [StoreFacts("a", of, 0.5), StoreFacts("b", of, 0.0)]
    with pytest.raises(NemoKDError, match=r"KDConfig.alpha_end=0.1 has no effect .* \[0.5, 0.0\]"):
        check_stores(own, schedule)
    check_stores(own, schedule, training=False)
    check_stores([*own, StoreFacts("c", of)], schedule)
    check_stores([], schedule)
    check_stores(own, KDSchedule(alpha=0.9, support="topk", temperature_end=2.0))
