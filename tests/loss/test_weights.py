"""Tokens weighed by sample, or without a teacher, over 1, 2 and 4 ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo_kd.loss import SUPPORTS, KDConfig, TopK, linear_sft_kd_loss, reference, sft_kd_loss
from tests.loss.ranks import Check, Ranks, check_name
from tests.loss.sharded import columns, group, padded, single, student_logits, teacher_rows

N, V, K, H = 24, 53, 6, 12


def problem() -> tuple[torch.Tensor, TopK, torch.Tensor]:
    """(labels [N], a teacher that has not seen every third token, weights [N, 2])."""
    generator = torch.Generator().manual_seed(4)
    labels = torch.randint(V, (N,), generator=generator)
    seen = torch.arange(N) % 3 > 0
    alpha = torch.rand(N, generator=generator) * seen
    alpha[1] = 0  # seen by the teacher, but not learned from it
    rows = teacher_rows(N, V, K, 1.0, seed=4)
    teacher = TopK(
        ids=torch.where(seen.unsqueeze(-1), rows.ids, -1),
        logits=torch.where(seen.unsqueeze(-1), rows.logits, -torch.inf),
        logsumexp=torch.where(seen, rows.logsumexp, 0),
    )
    return labels, teacher, torch.stack([1 - alpha, alpha], -1)


def expected_losses(
    z: torch.Tensor, labels: torch.Tensor, teacher: TopK, weights: torch.Tensor, config: KDConfig
) -> torch.Tensor:
    """[N] of student logits z [N, V], float64, from the definition."""
    nll = -z.log_softmax(-1).gather(1, labels.unsqueeze(1)).squeeze(1)
    seen = (teacher.ids >= 0).any(-1)
    rows = teacher[seen]
    kd = torch.zeros_like(nll)
    kd[seen] = reference.sft_kd_loss(z[seen], labels[seen], rows, config)[2]
    weights = weights.double()
    return weights[:, 0] * nll + weights[:, 1] * kd


def configurations() -> list[KDConfig]:
    supports = [KDConfig(support=support) for support in SUPPORTS]
    return [*supports, KDConfig(divergence="reverse_kl")]


def check_weights_of_logits() -> None:
    labels, teacher, weights = problem()
    whole = student_logits((N,), V, torch.float32, seed=9)
    for config in configurations():
        shard = whole[:, columns(padded(V))].clone().requires_grad_()
        result = sft_kd_loss(
            shard, labels, teacher, config, weights=weights, group=group(), vocab_size=V
        )
        result.loss.sum().backward()
        dense = whole[:, :V].double().requires_grad_()
        expected = expected_losses(dense, labels, teacher, weights, config)
        expected.sum().backward()
        torch.testing.assert_close(result.loss.double(), expected, rtol=2e-6, atol=2e-6)
        gradient = torch.zeros(N, padded(V), dtype=torch.float64)
        assert dense.grad is not None and shard.grad is not None
        gradient[:, :V] = dense.grad
        error = (shard.grad.double() - gradient[:, columns(padded(V))]).abs().max()
        assert error < 2e-6, config
        unseen = (teacher.ids < 0).all(-1)
        assert not result.kd[unseen].any()
        assert torch.equal(result.metrics["student_mass"].isnan(), unseen)
        assert not result.metrics["top1_label"].isnan().any()


def check_weights_of_the_fused_lm_head() -> None:
    labels, teacher, weights = problem()
    generator = torch.Generator().manual_seed(8)
    hidden = torch.randn(N, H, generator=generator)
    head = torch.randn(padded(V), H, generator=generator)
    uneven = torch.rand(N, generator=generator)  # a gradient that differs from token to token
    for config in configurations():
        for of_tokens in (torch.ones(N), uneven):
            mine = hidden.clone().requires_grad_()
            rows = head[columns(padded(V))].clone().requires_grad_()
            options: dict[str, Any] = {"group": group(), "vocab_size": V, "chunk_tokens": 5}
            result = linear_sft_kd_loss(
                mine, rows, labels, teacher, config, weights=weights, **options
            )
            (result.loss * of_tokens).sum().backward()
            dense, dense_head = hidden.double().requires_grad_(), head.double().requires_grad_()
            z = (dense @ dense_head.T)[:, :V]
            expected = expected_losses(z, labels, teacher, weights, config)
            (expected * of_tokens).sum().backward()
            torch.testing.assert_close(result.loss.double(), expected, rtol=1e-5, atol=1e-5)
            assert mine.grad is not None and rows.grad is not None
            assert dense.grad is not None and dense_head.grad is not None
            close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
            torch.testing.assert_close(mine.grad.double(), dense.grad, **close)
            mine_of_head = dense_head.grad[columns(padded(V))]
            torch.testing.assert_close(rows.grad.double(), mine_of_head, **close)


@pytest.mark.parametrize("ranks", [1, 2, 4], indirect=True)
@pytest.mark.parametrize(
    "check", [check_weights_of_logits, check_weights_of_the_fused_lm_head], ids=check_name
)
def test_weighted_tokens_agree_with_the_dense_reference(ranks: Ranks, check: Check) -> None:
    ranks.run(check)


def student_logits_alone(n: int) -> torch.Tensor:
    return 3 * torch.randn(n, V, generator=torch.Generator().manual_seed(1))


def teacher_alone(n: int) -> TopK:
    return single(reference.topk(torch.randn(n, V, generator=torch.Generator().manual_seed(2)), K))


def test_weights_of_another_number_are_refused() -> None:
    labels = torch.zeros(10, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"weights have shape \(9, 2\), expected \(10, 2\)"):
        z, teacher = student_logits_alone(10), teacher_alone(10)
        sft_kd_loss(z, labels, teacher, KDConfig(), weights=torch.ones(9, 2))
