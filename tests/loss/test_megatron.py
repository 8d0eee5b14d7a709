"""The cross-entropy is Megatron's own, on 1 and 2 ranks, value and gradient."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from nemo_kd.loss import KDConfig, sft_kd_loss
from tests.loss.ranks import Ranks
from tests.loss.sharded import columns, group, padded, student_logits, teacher_rows

S, B, V = 4, 3, 41


def check_equals_megatron() -> None:
    """Whole vocabulary, and padding columns counted: what Megatron's function always does."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    whole = student_logits((S, B), V, torch.float32, seed=6)
    whole[..., V:] = 0.5  # counted: not far above the rest
    labels = torch.arange(S * B).view(S, B) % V
    weight = torch.rand(S, B, generator=torch.Generator().manual_seed(6))
    config = KDConfig(alpha=0.0, count_padding=True)
    teacher = teacher_rows(S * B, V, 5, 1.0, seed=6)
    theirs = whole[..., columns(padded(V))].clone().requires_grad_()
    expected = vocab_parallel_cross_entropy(theirs.clone(), labels)  # it writes over its input
    (expected * weight).sum().backward()
    assert theirs.grad is not None
    for given in (None, teacher):
        ours = whole[..., columns(padded(V))].clone().requires_grad_()
        result = sft_kd_loss(ours, labels, given, config, group=group(), vocab_size=V)
        (result.loss * weight).sum().backward()
        assert ours.grad is not None
        torch.testing.assert_close(result.loss, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-7)
    parallel_state.destroy_model_parallel()


@pytest.mark.parametrize("ranks", [1, 2], indirect=True)
def test_alpha_0_is_megatrons_cross_entropy(ranks: Ranks) -> None:
    ranks.run(check_equals_megatron)
