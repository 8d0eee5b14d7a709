"""Context parallelism without attention: the ranks' parts together are the whole sequence."""

from __future__ import annotations

import pytest
import torch

from nemo_kd.data import answer_tokens, context_parallel_positions
from nemo_kd.loss import KDConfig, sft_kd_loss
from nemo_kd.topk import TopK

V, K, S = 37, 5, 48
# What samples a packed row has; None: rows of one sample each.
SAMPLES = [None, [0, 16, 40, 48]]


def batch(b: int, empty: bool) -> tuple[torch.Tensor, torch.Tensor, list[TopK]]:
    """labels [B, S], loss_mask [B, S] and the teachers; with `empty` a row without answers."""
    generator = torch.Generator().manual_seed(b)
    labels = torch.randint(V, (b, S), generator=generator)
    mask = (torch.rand(b, S, generator=generator) < 0.4).float()
    if empty:
        mask[0] = 0
    teachers = []
    for row in mask:
        logits = torch.randn(int(row.sum()), V, generator=generator)
        top = logits.topk(K)
        teachers.append(
            TopK(
                ids=top.indices.numpy(),
                logits=top.values.numpy(),
                logsumexp=logits.logsumexp(-1).numpy(),
            )
        )
    return labels, mask, teachers


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("samples", SAMPLES)
def test_every_position_belongs_to_one_rank_and_the_causal_work_is_even(
    size: int, samples: list[int] | None
) -> None:
    parts = [context_parallel_positions(S, rank, size, samples) for rank in range(size)]
    assert torch.cat(parts).sort().values.equal(torch.arange(S))
    for start, end in zip((samples or [0, S])[:-1], (samples or [0, S])[1:], strict=True):
        mine = [part[(part >= start) & (part < end)] for part in parts]
        work = [int((part - start + 1).sum()) for part in mine]  # keys that each query sees
        assert len(set(work)) == 1


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("empty", [False, True])
def test_losses_and_gradients_of_the_ranks_are_those_of_the_whole(
    size: int, samples: list[int] | None, empty: bool
) -> None:
    b = 1 if samples else 3
    labels, mask, teachers = batch(b, empty)
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(S, b, V, generator=generator, dtype=torch.float64)
    config = KDConfig(alpha=0.3)

    whole = logits.clone().requires_grad_()
    answers = answer_tokens(mask, teachers)
    result = sft_kd_loss(whole, labels.t(), answers.topk, config, positions=answers.positions)
    result.loss.sum().backward()

    total, kept = torch.zeros(()), torch.zeros(S, b, V, dtype=torch.float64)
    for rank in range(size):
        at = context_parallel_positions(S, rank, size, samples)
        mine = logits[at].clone().requires_grad_()
        answers = answer_tokens(mask, teachers, own_positions=at)
        own = mask.t()[at].reshape(-1).nonzero().squeeze(-1)
        assert answers.positions.equal(own)
        part = sft_kd_loss(mine, labels.t()[at], answers.topk, config, positions=own)
        assert part.loss.detach().allclose(result.loss.detach()[at], atol=1e-6)
        part.loss.sum().backward()
        total = total + part.loss.detach().sum()
        assert mine.grad is not None
        kept[at] = mine.grad
    assert whole.grad is not None and kept.allclose(whole.grad, atol=1e-6)
    assert float(total) == pytest.approx(float(result.loss.detach().sum()), rel=1e-6)


def test_the_teachers_row_is_that_of_the_whole_sequence() -> None:
    """Counting answers within a rank's own part would give other rows."""
    _, mask, teachers = batch(1, empty=False)
    at = context_parallel_positions(S, 1, 2)
    rows = mask[0].bool().nonzero()[:, 0].tolist()  # position of each teacher row
    found = answer_tokens(mask, teachers, own_positions=at)
    expected = [rows.index(int(p)) for p in at if mask[0, p]]
    assert found.topk.ids.equal(torch.from_numpy(teachers[0].ids[expected]))
    assert expected != list(range(len(expected)))


def test_a_length_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="sequence of 18 tokens cannot be cut into 4 equal chunks"):
        context_parallel_positions(18, 0, 2)
    with pytest.raises(ValueError, match="context_parallel_size=4; pad it"):
        context_parallel_positions(32, 0, 4, [0, 16, 28, 32])
