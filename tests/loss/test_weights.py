"""Tokens weighed by sample, without a teacher, or selected by entropy, over 1, 2 and 4 ranks."""

from __future__ import annotations

import math
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
    weights = weights.double().clone()
    if config.top_entropy_fraction < 1:
        _, q = reference.distributions(z[seen], rows, KDConfig(support="bucket"))
        entropy = torch.full_like(nll.detach(), -torch.inf)
        entropy[seen] = -(q * q.log()).sum(-1).detach()
        entropy[weights[:, 1] == 0] = -torch.inf
        count = int((entropy > -torch.inf).sum())
        chosen = entropy.topk(math.ceil(config.top_entropy_fraction * count)).indices
        factor = torch.zeros_like(entropy)
        factor[chosen] = count / len(chosen)
        weights[:, 1] *= factor
    return weights[:, 0] * nll + weights[:, 1] * kd


def configurations() -> list[KDConfig]:
    supports = [KDConfig(support=support) for support in SUPPORTS]
    selected = [KDConfig(top_entropy_fraction=share) for share in (0.2, 0.5)]
    return [*supports, *selected, KDConfig(divergence="reverse_kl", top_entropy_fraction=0.3)]


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


def test_selection_keeps_the_weight_of_the_distillation() -> None:
    """Its sum over the selected is a mean over them, times the weight and the tokens."""
    labels = torch.zeros(10, dtype=torch.int64)
    z = student_logits_alone(10)
    teacher = teacher_alone(10)
    for share, count in ((0.2, 2), (0.25, 3), (0.01, 1), (1.0, 10)):
        config = KDConfig(sft_weight=0, kd_weight=3, top_entropy_fraction=share)
        result = sft_kd_loss(z, labels, teacher, config)
        chosen = result.loss > 0
        assert int(chosen.sum()) == count
        mean = float(result.kd[chosen].mean())
        assert float(result.loss.sum()) == pytest.approx(3 * 10 * mean, rel=1e-5)
        entropy = result.metrics["student_entropy"]
        assert count == 10 or float(entropy[chosen].min()) > float(entropy[~chosen].max())


def student_logits_alone(n: int) -> torch.Tensor:
    return 3 * torch.randn(n, V, generator=torch.Generator().manual_seed(1))


def teacher_alone(n: int) -> TopK:
    return single(reference.topk(torch.randn(n, V, generator=torch.Generator().manual_seed(2)), K))


@pytest.mark.parametrize("fraction", [0.0, -0.2, 1.5, float("nan")])
def test_a_fraction_outside_0_to_1_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"top_entropy_fraction is .* in \(0, 1\]"):
        KDConfig(top_entropy_fraction=fraction)


def test_weights_of_another_number_are_refused() -> None:
    labels = torch.zeros(10, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"weights have shape \(9, 2\), expected \(10, 2\)"):
        z, teacher = student_logits_alone(10), teacher_alone(10)
        sft_kd_loss(z, labels, teacher, KDConfig(), weights=torch.ones(9, 2))
