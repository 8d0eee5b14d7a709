"""What each support does to the gradient, and to a teacher as it is stored."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nemo_kd.loss import DIVERGENCES, SUPPORTS, KDConfig, TopK, reference, sft_kd_loss
from nemo_kd.loss import vocab_parallel_topk as topk
from tests.loss.sharded import single

KINDS = [(d, s) for d in DIVERGENCES for s in SUPPORTS if (d, s) != ("reverse_kl", "vocab")]
LABELS = torch.zeros(6, dtype=torch.int64)


def teacher_of(z: torch.Tensor, k: int, temperature: float = 1.0) -> TopK:
    return single(reference.topk(z, k, temperature))


def gradient_of(z: torch.Tensor, teacher: TopK, config: KDConfig) -> torch.Tensor:
    leaf = z.clone().requires_grad_()
    sft_kd_loss(leaf, LABELS, teacher, config).kd.sum().backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("support", SUPPORTS)
def test_the_gradient_is_what_the_page_says(support: str, temperature: float) -> None:
    """docs/loss.md, "Supports": forward KL, T · (q - target)."""
    torch.manual_seed(0)
    z, teacher = torch.randn(6, 30), teacher_of(torch.randn(6, 30), 5, temperature)
    assert teacher.logsumexp is not None
    q = (z.double() / temperature).softmax(1)
    kept = torch.zeros_like(q).scatter(1, teacher.ids, 1.0)
    t = teacher.logits.double() / temperature
    exact = torch.exp(t - teacher.logsumexp.double()[:, None])
    p = torch.zeros_like(q).scatter(1, teacher.ids, exact if support == "bucket" else t.softmax(1))
    rest = q * (1 - kept)
    if support == "bucket":
        target = p + rest / rest.sum(1, keepdim=True) * (1 - p.sum(1, keepdim=True))
    elif support == "vocab":
        target = p
    else:
        q = q * kept / (q * kept).sum(1, keepdim=True)
        target = p
    found = gradient_of(z, teacher, KDConfig(support=support, temperature=temperature))
    torch.testing.assert_close(found.double(), temperature * (q - target), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("divergence", "support"), KINDS)
@pytest.mark.parametrize("scale", [0.0, 160.0, 1e4])
def test_extreme_students_have_finite_values_and_a_gradient_that_sums_to_zero(
    divergence: str, support: str, scale: float
) -> None:
    """No logit's level matters, so that a row's gradient sums to 0."""
    torch.manual_seed(1)
    z = scale * torch.randn(6, 40).sign() + torch.randn(6, 40) * (scale > 0)
    config = KDConfig(divergence=divergence, support=support)
    teacher = teacher_of(torch.randn(6, 40), 7)
    gradient = gradient_of(z, teacher, config)
    value = sft_kd_loss(z, LABELS, teacher, config).kd
    assert value.isfinite().all() and (value >= -1e-6).all()
    assert gradient.isfinite().all()
    size = gradient.abs().sum(1).clamp_min(1.0)
    assert (gradient.sum(1).abs() <= 1e-5 * size).all()


@pytest.mark.parametrize("stored", ["float32", "float16 beside the log-sum-exp"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_sure_teacher_rounded_by_its_store_gives_a_usable_loss(
    divergence: str, stored: str
) -> None:
    """Its mass in the K may come out as 1 or a little more: nothing to punish the student for."""
    torch.manual_seed(0)
    n, v = 300, 500
    teacher_z, z = torch.randn(n, v), torch.randn(n, v)
    teacher_z[:, 0] += torch.linspace(4, 30, n)
    teacher = teacher_of(teacher_z, 50)
    assert teacher.logsumexp is not None
    level = teacher.logsumexp[:, None]
    if stored != "float32":
        teacher = replace(teacher, logits=(teacher.logits - level).half().float() + level)
    mass = torch.exp(teacher.logits.double() - level.double()).sum(1)
    assert (mass >= 1).any() and (mass < 1).any()
    leaf = z.clone().requires_grad_()
    config = KDConfig(alpha=1.0, divergence=divergence)
    kd = sft_kd_loss(leaf, torch.zeros(n, dtype=torch.int64), teacher, config).kd
    kd.sum().backward()
    assert leaf.grad is not None
    # No probability here is below e^-50, so that no divergence is above 50 nats.
    assert kd.max() < 50 and leaf.grad.abs().max() < 50


@pytest.mark.parametrize("padding", [-torch.inf, 0.0, 99.0])
def test_teacher_and_student_may_be_padded_to_different_widths(padding: float) -> None:
    torch.manual_seed(2)
    v = 20
    teacher_z, z = torch.randn(6, v) - 500, torch.randn(6, v) - 500
    plain = sft_kd_loss(z, LABELS, topk(teacher_z, 4), KDConfig())
    wide_teacher = torch.nn.functional.pad(teacher_z, (0, 12), value=padding)
    wide_z = torch.nn.functional.pad(z, (0, 44), value=padding).requires_grad_()
    teacher = topk(wide_teacher, 4, vocab_size=v)
    found = sft_kd_loss(wide_z, LABELS, teacher, KDConfig(), vocab_size=v)
    found.loss.sum().backward()
    torch.testing.assert_close(found.loss, plain.loss, rtol=1e-6, atol=1e-6)
    assert wide_z.grad is not None and not wide_z.grad[:, v:].any()
