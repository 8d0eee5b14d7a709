"""Random draws from the teacher are accepted exactly where their mean gradient is right."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from nemo_kd.loss import DIVERGENCES, SUPPORTS, KDConfig, TopK, sft_kd_loss
from nemo_kd.loss.linearity import nonlinear_settings
from nemo_kd.teacher.sampling import vocab_parallel_sample

N, V, K, DRAWS = 8, 30, 4, 400
Gradients = torch.Tensor  # [..., N, V + 1], the last column is the vocabulary's padding


def configurations() -> list[KDConfig]:
    """Every support with every divergence and temperature; padding counted."""
    found = [KDConfig(count_padding=True), KDConfig(support="vocab", count_padding=True)]
    for support, divergence, temperature in product(SUPPORTS, DIVERGENCES, (1.0, 2.0)):
        if support != "vocab" or divergence != "reverse_kl":  # infinite
            found.append(KDConfig(support=support, divergence=divergence, temperature=temperature))
    return found


def name_of(config: KDConfig) -> str:
    changed = [
        f"{field.name}={getattr(config, field.name)}"
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != field.default
    ]
    return " ".join(changed) or "defaults"


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """(teacher's logits [N, V], student's [N, V + 1]) in float64."""
    generator = torch.Generator().manual_seed(3)
    options: dict[str, Any] = {"dtype": torch.float64, "generator": generator}
    teacher = 2 * torch.randn(N, V, **options)
    return teacher, torch.randn(N, V + 1, **options)


def gradient(student: torch.Tensor, teacher: TopK, config: KDConfig) -> Gradients:
    """Of the distillation alone; every row of `student` is a token."""
    z = student.clone().requires_grad_()
    alone = replace(config, alpha=1.0)
    labels = torch.zeros(len(z), dtype=torch.int64)
    loss = sft_kd_loss(z.clone(), labels, teacher, alone, vocab_size=V).loss
    return torch.autograd.grad(loss.sum(), z)[0]


def repeated(x: torch.Tensor, times: int) -> torch.Tensor:
    return x.expand(times, *x.shape).reshape(-1, x.shape[-1])


def draws(teacher: torch.Tensor) -> TopK:
    """[DRAWS · N] rows; the random numbers of a token are spread evenly, in a random order."""
    order = torch.rand(DRAWS, N, generator=torch.Generator().manual_seed(5)).argsort(0)
    uniform = ((order + 0.5) / DRAWS).double().reshape(-1)
    return vocab_parallel_sample(repeated(teacher, DRAWS), K, uniform)


def bias_and_error(config: KDConfig) -> tuple[float, float]:
    """(|mean over draws - expected|, the Monte Carlo error of it), relative to the expected.

    Expected: the gradient of the teacher's whole distribution on all ids.
    """
    teacher, student = problem()
    logits, ids = teacher.sort(-1, descending=True)
    temperature = config.temperature
    everything = TopK(
        ids=ids,
        logits=logits,
        logsumexp=torch.logsumexp(teacher / temperature, -1),
        temperatures=(temperature,),
    )
    expected = gradient(student, everything, config)
    # Measured past the refusals of draws and of another temperature.
    drawn = replace(draws(teacher), draws=False, temperatures=(temperature,))
    drawn = replace(drawn, logsumexp=torch.logsumexp(drawn.logits / temperature, -1))
    found = gradient(repeated(student, DRAWS), drawn, config).view(DRAWS, N, V + 1)
    error = (found.var(0) / DRAWS).sum().sqrt()
    bias, size = (found.mean(0) - expected).norm(), expected.norm()
    return float(bias / size), float(error / size)


@pytest.mark.parametrize("config", configurations(), ids=name_of)
def test_a_setting_is_refused_exactly_if_draws_are_biased_with_it(config: KDConfig) -> None:
    bias, error = bias_and_error(config)
    if nonlinear_settings(config):
        assert bias > 3 * error and bias > 0.05
    else:
        assert bias < error and bias < 0.02
        assert config.divergence == "forward_kl" and config.support != "topk"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, []),
        ({"support": "vocab", "count_padding": True, "alpha": 0.1}, []),
        ({"sft_weight": 0.0, "kd_weight": 2.5}, []),
        ({"support": "topk"}, ["support"]),
        ({"divergence": "jsd", "beta": 0.999}, ["divergence"]),
        ({"divergence": "skew_forward_kl", "skew": 1e-4}, ["divergence"]),
        ({"support": "vocab", "temperature": 1.01}, ["temperature"]),
        ({"alpha": 0.0, "divergence": "reverse_kl"}, ["divergence"]),
        (
            {"support": "topk", "divergence": "jsd", "count_padding": True},
            ["support", "divergence"],
        ),
    ],
)
def test_what_makes_draws_biased_is_named(settings: dict[str, float], named: list[str]) -> None:
    assert list(nonlinear_settings(KDConfig(**settings))) == named  # type: ignore[arg-type]
