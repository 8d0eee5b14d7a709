"""From logits to gradients nothing depends on a tensor's values, so no host waits for its device.

Fake tensors have shapes only: `nonzero`, `item` or a branch on a tensor fails on them. Their device
is no CPU, on which the losses check their input.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from nemo_kd.loss import DIVERGENCES, SUPPORTS, KDConfig, TopK, linear_sft_kd_loss, sft_kd_loss

S, B, N, V, VP, K, H = 6, 3, 7, 20, 24, 5, 4
CONFIGURATIONS = [
    KDConfig(support=support, divergence=divergence, temperature=2.0, top_entropy_fraction=fraction)
    for support in SUPPORTS
    for divergence in DIVERGENCES
    for fraction in (1.0, 0.3)
    if (support, divergence) != ("vocab", "reverse_kl")  # infinite
]


@pytest.fixture(autouse=True)
def fake() -> Iterator[None]:
    with FakeTensorMode(), torch.device("meta"):
        yield


def problem(k: int = K) -> tuple[torch.Tensor, TopK, dict[str, Any]]:
    """labels [S, B], the teacher's N rows, and how the losses are told which tokens count."""
    teacher = TopK(
        ids=torch.zeros(N, k, dtype=torch.int64),
        logits=torch.zeros(N, k),
        logsumexp=torch.zeros(N),
        temperatures=(2.0,),
    )
    labels = torch.zeros(S, B, dtype=torch.int64)
    positions = torch.zeros(N, dtype=torch.int64)
    return labels, teacher, {"positions": positions, "vocab_size": V}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("k", [K, V])
def test_the_loss_of_logits_never_waits(k: int, weighted: bool) -> None:
    labels, teacher, options = problem(k)
    weights = torch.ones(N, 2) if weighted else None
    for config in CONFIGURATIONS:
        for inplace in (False, True):
            logits = torch.randn(B, S, VP, requires_grad=True)
            result = sft_kd_loss(
                (logits * 1).transpose(0, 1),  # [S, B, Vp], in the strides of Megatron-core's
                labels,
                teacher,
                config,
                weights=weights,
                inplace=inplace,
                **options,
            )
            result.loss.sum().backward()
            assert result.loss.shape == (S, B) and logits.grad is not None


@pytest.mark.parametrize("weighted", [False, True])
def test_the_fused_lm_head_never_waits(weighted: bool) -> None:
    labels, teacher, options = problem()
    weights = torch.ones(N, 2) if weighted else None
    for config in CONFIGURATIONS:
        hidden = torch.randn(S, B, H, requires_grad=True)
        weight = torch.randn(VP, H, requires_grad=True)
        result = linear_sft_kd_loss(
            hidden,
            weight,
            labels,
            teacher,
            config,
            weights=weights,
            chunk_tokens=3,
            logit_softcap=30.0,
            equal_gradients=True,
            **options,
        )
        result.loss.sum().backward()
        assert result.loss.shape == (S, B) and hidden.grad is not None and weight.grad is not None


def test_a_gradient_that_is_looked_at_would_wait() -> None:
    """Without the promise of equal gradients: the test above can fail."""
    labels, teacher, options = problem()
    hidden, weight = torch.randn(S, B, H, requires_grad=True), torch.randn(VP, H)
    loss = linear_sft_kd_loss(
        hidden, weight, labels, teacher, KDConfig(temperature=2.0), **options
    ).loss
    with pytest.raises(DataDependentOutputException):
        loss.sum().backward()
