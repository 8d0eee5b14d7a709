"""Losses in place and fused losses under activation checkpointing, and without gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from nemo_kd.loss import KDConfig, linear_sft_kd_loss, sft_kd_loss
from nemo_kd.topk import TopK

N, V, K, H = 7, 33, 5, 6
LABELS = torch.arange(N)
Loss = Callable[[torch.Tensor], torch.Tensor]


def teacher() -> TopK:
    torch.manual_seed(1)
    z = torch.randn(N, V, dtype=torch.float64)
    logits, ids = z.topk(K)
    return TopK(ids=ids, logits=logits, logsumexp=z.logsumexp(-1, keepdim=True))


def of_logits(inplace: bool) -> Loss:
    """Σ loss of logits [N, V]."""
    return lambda z: sft_kd_loss(z, LABELS, teacher(), KDConfig(), inplace=inplace).loss.sum()


def gradient(loss: Loss, reentrant: bool | None, *, head: bool = False) -> torch.Tensor:
    """That of z [N, V] in loss(2 z), or loss(tanh(z) W) with the product checkpointed as well."""
    torch.manual_seed(0)
    z = torch.randn(N, V, dtype=torch.float64, requires_grad=True)
    w = torch.randn(V, V, dtype=torch.float64)
    before, inside = (z.tanh(), lambda x: loss(x @ w)) if head else (z * 2, loss)
    if reentrant is None:
        inside(before).backward()
    else:
        value: torch.Tensor = checkpoint(inside, before, use_reentrant=reentrant)
        value.backward()
    assert z.grad is not None
    return z.grad


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_in_place_the_gradient_is_the_same(reentrant: bool | None, head: bool) -> None:
    expected = gradient(of_logits(False), None, head=head)
    found = gradient(of_logits(True), reentrant, head=head)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_fused_loss_has_the_same_gradient(reentrant: bool) -> None:
    torch.manual_seed(2)
    weight = torch.randn(V, V, dtype=torch.float64)

    def fused(hidden: torch.Tensor) -> torch.Tensor:
        result = linear_sft_kd_loss(
            hidden, weight, LABELS, teacher(), KDConfig(), chunk_tokens=3, equal_gradients=True
        )
        return result.loss.sum()

    expected = gradient(lambda hidden: of_logits(False)(hidden @ weight.t()), None)
    torch.testing.assert_close(gradient(fused, reentrant), expected, rtol=1e-10, atol=1e-12)


def test_logits_without_a_recorded_gradient_stay_as_they_are() -> None:
    z = torch.randn(N, V, dtype=torch.float64)
    for logits, recorded in ((z.clone().requires_grad_(), False), (z.clone(), True)):
        with torch.set_grad_enabled(recorded):
            of_logits(True)(logits)
        assert torch.equal(logits.detach(), z)


def test_an_output_that_its_own_operation_saved_is_not_spoiled_silently() -> None:
    """exp saves its result for its gradient, and the loss writes over it."""
    z = torch.randn(N, V, requires_grad=True)
    value = of_logits(True)(z.exp())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_a_later_operation_that_saved_the_logits_fails_after_the_loss() -> None:
    logits = torch.randn(N, V, requires_grad=True) * 1
    value = of_logits(True)(logits)
    later = logits.square().sum()
    value.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        later.backward()
