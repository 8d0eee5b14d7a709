"""Input that does not fit is refused: the message names the thing, both values, what to do."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

from nemo_kd.errors import NemoKDError
from nemo_kd.loss import (
    DIVERGENCES,
    KDConfig,
    KDSchedule,
    TopK,
    gather_logits_and_logsumexp,
    linear_sft_kd_loss,
    sft_kd_loss,
    vocab_parallel_topk,
)

N, V = 3, 12


def call(**changes: Any) -> None:
    arguments: dict[str, Any] = {
        "logits": torch.randn(N, V),
        "labels": torch.arange(N),
        "teacher": vocab_parallel_topk(torch.randn(N, V), 4),
        "config": KDConfig(),
    }
    sft_kd_loss(**(arguments | changes))


def rows(n: int, **changes: Any) -> TopK:
    return replace(vocab_parallel_topk(torch.randn(n, V), 4), **changes)


def absent(ids: torch.Tensor) -> TopK:
    return rows(N, ids=ids.expand(N, 4), logits=torch.full((N, 4), -torch.inf))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.tensor([0, -100, 1])}, "from -100 to 1, expected 0 to 11: mask"),
        ({"labels": torch.tensor([0, V, 1])}, "from 0 to 12, expected 0 to 11"),
        ({"labels": torch.tensor([0, 11, 1]), "vocab_size": 11}, "expected 0 to 10"),
        ({"labels": torch.arange(N)[:, None]}, r"labels have shape \(3, 1\), expected \(3,\)"),
        ({"mask": torch.ones(2, dtype=torch.bool)}, r"mask have shape \(2,\), expected \(3,\)"),
        ({"teacher": None}, "weight of the distillation is 0.9, but there is no teacher"),
        ({"teacher": rows(2)}, "has 2 rows, but 3 positions are chosen"),
        ({"teacher": rows(N, logsumexp=torch.full((N,), torch.nan))}, "row 0 .* NaN"),
        ({"teacher": rows(N, ids=torch.full((N, 4), -1))}, "row 0 has an id outside"),
        ({"teacher": absent(torch.tensor(-1))}, "an id outside"),
        ({"teacher": absent(torch.arange(-2, 2))}, "an id outside"),
        (
            {"teacher": rows(N, logsumexp=torch.zeros(N) - 9)},
            "row 0 has probabilities .* more than 1",
        ),
        ({"teacher": rows(N, logsumexp=None)}, "log-sum-exp at temperature 1, and"),
        ({"mask": torch.ones(N) > 0, "positions": torch.arange(N)}, "both given"),
        ({"mask": torch.full((N,), 0.5)}, "mask is torch.float32, expected torch.bool"),
        ({"positions": torch.tensor([0, 2, 2])}, "have 2 after 2: expected each once"),
        ({"positions": torch.tensor([2, 0, 1])}, "have 0 after 2"),
        ({"weights": torch.ones(N, 3)}, r"weights have shape \(3, 3\), expected \(3, 2\)"),
        (
            {"weights": torch.ones(1, 2), "teacher": None, "config": KDConfig(alpha=0)},
            r"weights have shape \(1, 2\), expected \(3, 2\)",
        ),
        ({"vocab_size": V + 1}, "vocab_size is 13, but the logits have 12 columns"),
        ({"vocab_size": 0}, "vocab_size is 0"),
    ],
)
def test_the_loss_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_mass_above_one_is_refused_at_each_temperature(temperature: float) -> None:
    teacher = vocab_parallel_topk(torch.randn(N, V), V, temperatures=(1.0, 2.0))
    call(teacher=teacher, config=KDConfig(temperature=temperature))
    low = teacher.logsumexp.clone()
    low[1, teacher.temperatures.index(temperature)] -= 0.02
    with pytest.raises(NemoKDError, match="row 1 has probabilities"):
        call(teacher=replace(teacher, logsumexp=low), config=KDConfig(temperature=temperature))


@pytest.mark.parametrize("softcap", [0.0, -5.0, float("nan")])
def test_a_softcap_that_is_none_is_refused(softcap: float) -> None:
    z = torch.randn(N, V)
    with pytest.raises(ValueError, match="expected a positive number, or None"):
        linear_sft_kd_loss(
            z, torch.eye(V), torch.arange(N), rows(N), KDConfig(), logit_softcap=softcap
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.randn(N, 5)}, r"logits have shape \(3, 5\), expected \(3, 4\)"),
        ({"logsumexp": torch.zeros(N, 2)}, r"expected \(3,\) or \(3, 1\) for ids \(3, 4\)"),
        ({"temperatures": (1.0, 2.0)}, r"expected \(3, 2\) for ids \(3, 4\)"),
        ({"ids": torch.arange(4)}, r"ids have shape \(4,\), expected \[N, K\]"),
    ],
)
def test_a_topk_of_unlike_shapes_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(NemoKDError, match=message):
        rows(N, **changes)


@pytest.mark.parametrize("support", ["bucket", "topk"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_log_sum_exp_at_another_temperature_is_refused(support: str, fused: bool) -> None:
    z = torch.randn(N, V)
    config = KDConfig(temperature=2.0, support=support)

    def loss(teacher: TopK) -> torch.Tensor:
        if fused:
            eye = torch.eye(V)
            return linear_sft_kd_loss(z, eye, torch.arange(N), teacher, config).loss
        return sft_kd_loss(z, torch.arange(N), teacher, config).loss

    with pytest.raises(NemoKDError, match="known at temperature 1, but the loss has temperature 2"):
        loss(rows(N))
    both = vocab_parallel_topk(torch.randn(N, V), 4, temperatures=(1.0, 2.0))
    assert loss(both).equal(loss(both.at(2.0)))
    if support == "topk":
        assert loss(replace(both, logsumexp=None)).equal(loss(both))


@pytest.mark.parametrize("fused", [False, True])
def test_draws_are_refused_by_a_loss_that_they_bias(fused: bool) -> None:
    z, teacher = torch.randn(N, V), rows(N, draws=True)

    def loss(config: KDConfig) -> torch.Tensor:
        if fused:
            return linear_sft_kd_loss(z, torch.eye(V), torch.arange(N), teacher, config).loss
        return sft_kd_loss(z, torch.arange(N), teacher, config).loss

    with torch.inference_mode(), pytest.raises(NemoKDError, match="not with divergence=jsd"):
        loss(KDConfig(divergence="jsd"))
    assert loss(KDConfig()).isfinite().all()
    assert loss(KDConfig(divergence="jsd", alpha=0.0)).isfinite().all()


@pytest.mark.parametrize("fused", [False, True])
def test_a_schedule_without_its_step_is_refused(fused: bool) -> None:
    z, teacher = torch.randn(N, V), rows(N)

    def loss(config: KDConfig) -> torch.Tensor:
        if fused:
            return linear_sft_kd_loss(z, torch.eye(V), torch.arange(N), teacher, config).loss
        return sft_kd_loss(z, torch.arange(N), teacher, config).loss

    schedule = KDSchedule(alpha=0.8, alpha_end=0.2)
    with pytest.raises(NemoKDError, match=r"alpha_end=0.2, but not the step: pass config=config.a"):
        loss(schedule)
    with pytest.raises(NemoKDError, match="config with temperature_end=2"):
        loss(KDSchedule(support="topk", temperature_end=2.0))
    torch.testing.assert_close(loss(schedule.at(1, 2)), loss(KDConfig(alpha=0.5)))
    assert loss(KDSchedule(alpha=0.5)).equal(loss(KDConfig(alpha=0.5)))


def test_the_others_refuse() -> None:
    z = torch.randn(N, V)
    with pytest.raises(ValueError, match="k is 13: expected 1 to 12"):
        vocab_parallel_topk(z, 13)
    with pytest.raises(ValueError, match="k is 11: expected 1 to 10"):
        vocab_parallel_topk(z, 11, vocab_size=10)
    for temperatures in ((), (1.0, 0.0)):
        with pytest.raises(ValueError, match="expected one or more, all > 0"):
            vocab_parallel_topk(z, 3, temperatures=temperatures)
    with pytest.raises(ValueError, match="differ in their leading dimensions"):
        gather_logits_and_logsumexp(z, torch.zeros(2, 1, dtype=torch.int64))
    hidden, weight = torch.randn(N, 6), torch.randn(V, 5)
    with pytest.raises(ValueError, match="differ in their last"):
        linear_sft_kd_loss(hidden, weight, torch.arange(N), rows(N), KDConfig())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 1.0}, "beta is 1.0: expected a value in "),
        ({"skew": 0.0}, "skew is 0.0: expected a value in "),
        ({"sft_weight": -1.0}, "sft_weight is -1.0: expected a finite value >= 0"),
        ({"kd_weight": float("inf")}, "kd_weight is inf"),
        ({"sft_weight": 0.0, "kd_weight": 0.0}, "nothing would be learned"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf: expected a value > 0 and at most 100"),
        ({"temperature": 101.0}, "temperature is 101.0: expected"),
        (
            {"beta": 0.3},
            "beta is 0.3, but divergence 'forward_kl' has no beta: set divergence to jsd, or leave",
        ),
        (
            {"divergence": "jsd", "skew": 0.2},
            "skew is 0.2, but divergence 'jsd' has no skew: set divergence to skew_forward_kl or "
            "skew_reverse_kl, or leave skew at 0.1",
        ),
    ],
)
def test_the_configuration_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KDConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "cosine"}, "schedule is 'cosine', but neither alpha nor temperature changes"),
        ({"schedule_steps": 8}, "schedule_steps is 8, but neither .* set alpha_end or temperature"),
    ],
)
def test_a_schedule_of_nothing_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(NemoKDError, match=message):
        KDSchedule(**settings)
    ends = KDSchedule(alpha_end=0.5, **settings).end
    assert (ends.alpha, ends.schedule, ends.schedule_steps) == (0.5, "linear", None)


def test_a_parameter_is_accepted_with_each_divergence_that_has_it() -> None:
    for name, divergence in DIVERGENCES.items():
        given: dict[str, Any] = {p: 0.3 for p in [divergence.parameter] if p}
        assert KDConfig(divergence=name, **given).divergence == name
    KDConfig(beta=0.5, skew=0.1)  # the defaults


def test_one_weight_given_leaves_the_other_at_1() -> None:
    assert KDConfig(kd_weight=0.3).weights == (1.0, 0.3)
    assert KDConfig(sft_weight=0.3).weights == (0.3, 1.0)
    assert KDConfig().weights == (1 - 0.9, 0.9) and KDConfig(alpha=0.2).weights == (0.8, 0.2)


@pytest.mark.parametrize("loss", ["of logits", "fused"])
def test_one_id_on_support_topk_is_warned_of_for_nothing_is_learned(loss: str) -> None:
    teacher = vocab_parallel_topk(torch.randn(N, V), 1)
    hidden, weight = torch.randn(N, 6), torch.randn(V, 6).requires_grad_()
    z = (hidden @ weight.t()).detach().requires_grad_()
    config = KDConfig(alpha=1.0, support="topk")
    with pytest.warns(UserWarning, match=r"K = 1.*Use support 'bucket'"):
        if loss == "fused":
            result = linear_sft_kd_loss(hidden, weight, torch.arange(N), teacher, config)
        else:
            result = sft_kd_loss(z, torch.arange(N), teacher, config)
    (gradient,) = torch.autograd.grad(result.loss.sum(), weight if loss == "fused" else z)
    assert not result.kd.any() and not gradient.any()


@pytest.mark.parametrize(
    ("k", "settings"),
    [
        (1, {"support": "bucket"}),
        (1, {"support": "vocab"}),
        (2, {"support": "topk"}),
        (1, {"support": "topk", "alpha": 0.0}),
    ],
)
def test_what_learns_from_one_id_is_not_warned_of(k: int, settings: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(teacher=vocab_parallel_topk(torch.randn(N, V), k), config=KDConfig(**settings))
