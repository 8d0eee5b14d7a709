"""Loss, top-K and fused LM head over 1, 2 and 4 ranks, against the dense float64 reference."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nemo_kd.loss import (
    DIVERGENCES,
    SUPPORTS,
    KDConfig,
    linear_sft_kd_loss,
    reference,
    sft_kd_loss,
    vocab_parallel_topk,
)
from tests.loss.ranks import Check, Ranks, check_name
from tests.loss.sharded import (
    columns,
    dense_gradient,
    group,
    padded,
    single,
    student_logits,
    teacher_rows,
)
from tests.loss.sharded_laws import LAWS, check_many_problems

# Rounding of the gradient to the logits' own dtype, relative to its largest entries.
GRADIENT_ERROR = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
S, B, V = 5, 3, 53  # Megatron's [S, B, Vp]; a vocabulary that nothing divides


def configurations(divergence: str) -> list[KDConfig]:
    return [
        KDConfig(divergence=divergence, support=support, temperature=temperature, alpha=0.4)
        for support in SUPPORTS
        for temperature in (0.5, 1.0, 2.0)
        if (divergence, support) != ("reverse_kl", "vocab")
    ]


def check_loss(config: KDConfig, k: int, dtype: torch.dtype, inplace: bool) -> None:
    whole = student_logits((S, B), V, dtype, seed=k)
    # A batch-first buffer seen sequence-first: Megatron's layout need not be contiguous.
    shard = whole[..., columns(padded(V))].transpose(0, 1).contiguous().requires_grad_()
    mask = torch.rand(S, B, generator=torch.Generator().manual_seed(k)) < 0.6
    rows, labels = int(mask.sum()), torch.arange(S * B).view(S, B) % V
    labels[~mask] = -100
    teacher = teacher_rows(rows, V, k, config.temperature, seed=k)
    weight = torch.rand(S, B, generator=torch.Generator().manual_seed(7))
    logits = (shard * 1).transpose(0, 1)  # not a leaf: its memory may be reused
    kept = logits.detach().clone()
    result = sft_kd_loss(
        logits, labels, teacher, config, group=group(), vocab_size=V, mask=mask, inplace=inplace
    )
    (result.loss * weight).sum().backward()
    if not inplace:
        assert torch.equal(logits.detach(), kept)
    expected, gradient = dense_gradient(
        whole[..., :V][mask], labels[mask], teacher, config, weight[mask]
    )
    torch.testing.assert_close(result.loss[mask].double(), expected, rtol=2e-6, atol=2e-6)
    assert not result.loss[~mask].any()
    dense = torch.zeros(S, B, padded(V), dtype=torch.float64)
    dense[..., :V][mask] = gradient
    assert shard.grad is not None
    error = (shard.grad.transpose(0, 1).double() - dense[..., columns(padded(V))]).abs().max()
    assert error <= GRADIENT_ERROR[dtype] * max(1.0, float(gradient.abs().max()))


def check_divergence(divergence: str) -> None:
    for config in configurations(divergence):
        for k in (1, 7, V):
            check_loss(config, k, torch.float32, inplace=False)


def check_dtypes() -> None:
    for dtype in GRADIENT_ERROR:
        check_loss(KDConfig(), 40, dtype, inplace=True)  # 40 of 53: more than a rank's columns


def check_topk() -> None:
    for k in (1, 10, V):
        # Whole numbers: ties everywhere, also across the ranks' borders.
        tied = student_logits((S, B), V, torch.float32, seed=3).round().to(torch.bfloat16)
        found = vocab_parallel_topk(
            tied[..., columns(padded(V))],
            k,
            group=group(),
            vocab_size=V,
            temperatures=(1.0, 2.0),
        )
        for place, temperature in enumerate((1.0, 2.0)):
            exact = reference.topk(tied[..., :V].reshape(-1, V).float(), k, temperature)
            assert torch.equal(found.ids, exact.ids)
            assert torch.equal(found.logits, exact.logits.float())
            assert exact.logsumexp is not None and found.logsumexp is not None
            torch.testing.assert_close(
                found.logsumexp[:, place].double(), exact.logsumexp, rtol=1e-6, atol=1e-6
            )


def check_an_equal_student_has_nothing_to_learn() -> None:
    z = student_logits((S, B), V, torch.float32, seed=5)
    for divergence in DIVERGENCES:
        config = KDConfig(divergence=divergence, alpha=1.0)
        teacher = single(reference.topk(z[..., :V].reshape(-1, V), 9))
        shard = z[..., columns(padded(V))].clone().requires_grad_()
        labels = torch.zeros(S, B, dtype=torch.int64)
        result = sft_kd_loss(shard, labels, teacher, config, group=group(), vocab_size=V)
        result.loss.sum().backward()
        assert shard.grad is not None
        assert result.kd.abs().max() < 1e-6 and shard.grad.abs().max() < 1e-6, divergence


def check_a_micro_batch_without_answers() -> None:
    shard = student_logits((S, B), V, torch.float32, seed=1)[..., columns(padded(V))]
    shard = shard.clone().requires_grad_()
    labels = torch.full((S, B), -100)
    result = sft_kd_loss(
        shard,
        labels,
        teacher_rows(0, V, 4, 1.0, seed=0),
        KDConfig(),
        group=group(),
        vocab_size=V,
        mask=torch.zeros(S, B, dtype=torch.bool),
    )
    result.loss.sum().backward()
    assert shard.grad is not None
    assert not result.loss.any() and not shard.grad.any()


def check_fused_lm_head() -> None:
    for sequence_parallel in (False, True):
        for softcap in (None, 5.0):
            check_fused_case(sequence_parallel, softcap)


def check_fused_case(sequence_parallel: bool, softcap: float | None) -> None:
    length, hidden_size, k = 8, 12, 6  # 8 positions: every number of ranks divides them
    generator = torch.Generator().manual_seed(11)
    hidden = torch.randn(length, B, hidden_size, generator=generator)
    weight = torch.randn(padded(V), hidden_size, generator=generator)
    mask = torch.rand(length, B, generator=generator) < 0.7
    labels = torch.arange(length * B).view(length, B) % V
    teacher, config = teacher_rows(int(mask.sum()), V, k, 1.0, seed=2), KDConfig()
    token_weight = torch.rand(length, B, generator=generator)

    each, rank = length // dist.get_world_size(), dist.get_rank()
    part = slice(rank * each, (rank + 1) * each) if sequence_parallel else slice(None)
    mine = hidden[part].clone().requires_grad_()
    rows = weight[columns(padded(V))].clone().requires_grad_()
    loss = linear_sft_kd_loss(
        mine,
        rows,
        labels,
        teacher,
        config,
        group=group(),
        vocab_size=V,
        mask=mask,
        sequence_parallel=sequence_parallel,
        logit_softcap=softcap,
        chunk_tokens=5,
    ).loss
    (loss * token_weight).sum().backward()

    dense_hidden, dense_weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    z = dense_hidden @ dense_weight.T
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    expected = reference.sft_kd_loss(z[mask][:, :V], labels[mask], teacher, config)[0]
    (expected * token_weight[mask].double()).sum().backward()
    torch.testing.assert_close(loss[mask].double(), expected, rtol=1e-5, atol=1e-5)
    assert mine.grad is not None and dense_hidden.grad is not None
    assert rows.grad is not None and dense_weight.grad is not None
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(mine.grad.double(), dense_hidden.grad[part], **close)
    torch.testing.assert_close(rows.grad.double(), dense_weight.grad[columns(padded(V))], **close)


CHECKS: tuple[Check, ...] = (
    *(partial(check_divergence, divergence) for divergence in DIVERGENCES),
    check_dtypes,
    check_topk,
    check_an_equal_student_has_nothing_to_learn,
    check_a_micro_batch_without_answers,
    check_fused_lm_head,
)


@pytest.mark.parametrize("ranks", [1, 2, 4], indirect=True)
@pytest.mark.parametrize("law", [*CHECKS, *LAWS], ids=check_name)
def test_every_rank_agrees_with_the_dense_reference(ranks: Ranks, law: Check) -> None:
    ranks.run(law)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4], indirect=True)
def test_many_shapes_and_settings(ranks: Ranks) -> None:
    ranks.run(check_many_problems)
