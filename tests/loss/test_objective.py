"""The per-token loss against its dense float64 reference, on one process."""

from __future__ import annotations

import pytest
import torch

from nemo_kd.loss import DIVERGENCES, SUPPORTS, KDConfig, reference, sft_kd_loss
from tests.loss.sharded import single


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_loss_and_gradient_equal_the_dense_reference(
    divergence: str, support: str, temperature: float
) -> None:
    if (divergence, support) == ("reverse_kl", "vocab"):
        pytest.skip("infinite, and refused by KDConfig")
    config = KDConfig(divergence=divergence, support=support, temperature=temperature, alpha=0.3)
    torch.manual_seed(0)
    logits = torch.randn(7, 53, requires_grad=True)
    teacher = single(reference.topk(torch.randn(7, 50), 5, temperature))
    labels, weight = torch.randint(50, (7,)), torch.rand(7)
    loss = sft_kd_loss(logits, labels, teacher, config, vocab_size=50).loss
    (loss * weight).sum().backward()
    dense = logits.detach().double()[:, :50].requires_grad_()
    expected = reference.sft_kd_loss(dense, labels, teacher, config)[0]
    (expected * weight).sum().backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[:, :50].double(), dense.grad, rtol=1e-5, atol=1e-7)
    assert not logits.grad[:, 50:].any()
