"""Laws of the divergences and of the supports."""

from __future__ import annotations

import itertools
import math
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_kd.loss import DIVERGENCES, KDConfig, MassWatch, reference, sft_kd_loss
from nemo_kd.loss.divergences import (
    forward_kl,
    jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
)

PARAMETER = {"beta": 0.3, "skew": 0.1}


def pair(seed: int, scale: float = 3.0, points: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(2, 5, points, generator=generator, dtype=torch.float64)
    log_p, log_q = z.log_softmax(-1)
    return log_p, log_q


@pytest.mark.parametrize("name", DIVERGENCES)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([0.01, 1.0, 10.0]))
def test_never_negative_and_zero_only_when_equal(name: str, seed: int, scale: float) -> None:
    divergence = DIVERGENCES[name]
    parameters = [PARAMETER[divergence.parameter]] if divergence.parameter else []
    log_p, log_q = pair(seed, scale)
    assert (divergence.function(log_p, log_q, *parameters) > 0).all()
    assert divergence.function(log_p, log_p, *parameters).abs().max() < 1e-14


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_bounds_and_symmetries(seed: int) -> None:
    p, q = pair(seed, scale=10.0)
    assert (jsd(p, q, 0.5) <= math.log(2) + 1e-12).all()
    for skewed in (skew_forward_kl(p, q, 0.1), skew_reverse_kl(p, q, 0.1)):
        assert (skewed <= -math.log(0.1) + 1e-12).all()
    torch.testing.assert_close(jsd(p, q, 0.3), jsd(q, p, 0.7))
    torch.testing.assert_close(reverse_kl(p, q), forward_kl(q, p))
    torch.testing.assert_close(skew_reverse_kl(p, q, 0.1), skew_forward_kl(q, p, 0.1))
    p, q = pair(seed, scale=1.0)
    torch.testing.assert_close(skew_forward_kl(p, q, 1e-12), forward_kl(p, q))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bucket_is_a_lower_bound_that_grows_with_k_to_the_whole(divergence: str) -> None:
    """Data-processing inequality: a coarser partition shows no more difference."""
    torch.manual_seed(0)
    v, labels = 30, torch.zeros(6, dtype=torch.int64)
    teacher_z, z = torch.randn(6, v).double(), torch.randn(6, v).double()
    config = KDConfig(alpha=1.0, divergence=divergence)
    values = []
    for k in (1, 3, 10, 29, v):
        values.append(sft_kd_loss(z, labels, reference.topk(teacher_z, k), config).kd)
    whole = reference.divergence(teacher_z.softmax(1), z.softmax(1), config)
    for smaller, larger in itertools.pairwise(values):
        assert (smaller <= larger + 1e-12).all()
    torch.testing.assert_close(values[-1], whole)


def test_with_one_token_kept_only_bucket_still_teaches() -> None:
    torch.manual_seed(0)
    teacher = reference.topk(torch.randn(4, 20), 1)
    for support, teaches in (("bucket", True), ("topk", False)):
        z = torch.randn(4, 20, requires_grad=True)
        config = KDConfig(alpha=1.0, support=support)
        sft_kd_loss(z, torch.zeros(4).long(), teacher, config).loss.sum().backward()
        assert z.grad is not None and bool(z.grad.abs().max() > 1e-3) == teaches


def test_support_topk_is_kl_div_over_the_k() -> None:
    """The peer's loss, by torch's own functions."""
    torch.manual_seed(0)
    z, teacher = torch.randn(5, 30), reference.topk(torch.randn(5, 30), 6, 2.0)
    config = KDConfig(alpha=1.0, support="topk", temperature=2.0)
    found = sft_kd_loss(z, torch.zeros(5).long(), teacher, config).kd
    log_q = (z.double().gather(1, teacher.ids) / 2).log_softmax(1)
    p = (teacher.logits / 2).softmax(1)
    expected = 4 * torch.nn.functional.kl_div(log_q, p, reduction="none").sum(1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_bucket_without_the_log_sum_exp_is_refused_and_topk_is_not() -> None:
    exact = reference.topk(torch.randn(3, 20), 4)
    teacher = replace(exact, logsumexp=None)
    z, labels = torch.randn(3, 20), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="needs the teacher's log-sum-exp at temperature 2"):
        sft_kd_loss(z, labels, teacher, KDConfig(temperature=2.0))
    result = sft_kd_loss(z, labels, teacher, KDConfig(support="topk"))
    assert result.loss.isfinite().all() and "teacher_mass" not in result.metrics


def test_a_low_teacher_mass_is_said_once_with_the_figure() -> None:
    watch = MassWatch(temperature=4.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch(0.97)
    with pytest.warns(UserWarning, match=r"stored tokens hold 0\.031 .* temperature 4"):
        watch(0.031)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch(0.02)
