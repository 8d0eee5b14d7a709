"""From logits to gradients nothing depends on a tensor's values, so no host waits for its device.

Fake tensors have shapes only: `nonzero`, `item` or a branch on a tensor fails on them. Their device
is no CPU, on which the losses check their input.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed._tools.fake_collectives  # lets collectives take fake tensors
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from nemo_kd.loss import DIVERGENCES, SUPPORTS, KDConfig, TopK, linear_sft_kd_loss, sft_kd_loss

S, B, N, V, VP, K, H = 6, 3, 7, 20, 24, 5, 4
CONFIGURATIONS = [
    KDConfig(support=support, divergence=divergence, temperature=2.0)
    for support in SUPPORTS
    for divergence in DIVERGENCES
    if (support, divergence) != ("vocab", "reverse_kl")  # infinite
]


@pytest.fixture(params=[1, 2], ids="TP {}".format, scope="module")
def ranks(request: pytest.FixtureRequest) -> Iterator[int]:
    """How many ranks the vocabulary is split over; the others are pretended."""
    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=0, world_size=request.param
    )
    yield request.param
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def fake(ranks: int) -> Iterator[None]:
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
    options = {"positions": positions, "vocab_size": V, "group": torch.distributed.group.WORLD}
    return labels, teacher, options


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("k", [K, V])
def test_the_loss_of_logits_never_waits(ranks: int, k: int, weighted: bool) -> None:
    labels, teacher, options = problem(k)
    weights = torch.ones(N, 2) if weighted else None
    for config in CONFIGURATIONS:
        for inplace in (False, True):
            logits = torch.randn(B, S, VP // ranks, requires_grad=True)
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
def test_the_fused_lm_head_never_waits(ranks: int, weighted: bool) -> None:
    labels, teacher, options = problem()
    weights = torch.ones(N, 2) if weighted else None
    for config in CONFIGURATIONS:
        sequence_parallel = ranks > 1 and weighted
        own = S // ranks if sequence_parallel else S
        hidden = torch.randn(own, B, H, requires_grad=True)
        weight = torch.randn(VP // ranks, H, requires_grad=True)
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
            sequence_parallel=sequence_parallel,
            **options,
        )
        result.loss.sum().backward()
        assert result.loss.shape == (S, B) and hidden.grad is not None and weight.grad is not None


def test_a_gradient_that_is_looked_at_would_wait(ranks: int) -> None:
    """Without the promise of equal gradients: the test above can fail."""
    labels, teacher, options = problem()
    hidden, weight = torch.randn(S, B, H, requires_grad=True), torch.randn(VP // ranks, H)
    loss = linear_sft_kd_loss(
        hidden, weight, labels, teacher, KDConfig(temperature=2.0), **options
    ).loss
    with pytest.raises(DataDependentOutputException):
        loss.sum().backward()
