"""At the ends of the number range, and with input that no loss can be right on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_kd.loss import (
    KDConfig,
    KDLoss,
    TopK,
    linear_sft_kd_loss,
    reference,
    sft_kd_loss,
    vocab_parallel_topk,
)
from tests.loss.sharded import single


def teacher_of(z: torch.Tensor, k: int) -> TopK:
    return single(reference.topk(z, k))


def both(
    z: torch.Tensor, labels: torch.Tensor, teacher: TopK, config: KDConfig
) -> tuple[KDLoss, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ours, its gradient; the dense loss, its gradient."""
    mine = z.clone().requires_grad_()
    result = sft_kd_loss(mine, labels, teacher, config)
    result.loss.sum().backward()
    dense = z.double().requires_grad_()
    expected = reference.sft_kd_loss(dense, labels, teacher, config)[0]
    expected.sum().backward()
    assert mine.grad is not None and dense.grad is not None
    return result, mine.grad, expected.detach(), dense.grad


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(1, 9),
    v=st.integers(2, 90),
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    transposed=st.booleans(),
)
def test_any_shape(
    n: int, v: int, data: st.DataObject, dtype: torch.dtype, transposed: bool
) -> None:
    k = data.draw(st.integers(1, v))
    torch.manual_seed(data.draw(st.integers(0, 9)))
    z = (4 * torch.randn(v, n)).t() if transposed else 4 * torch.randn(n, v)  # either stride
    z, teacher, labels = z.to(dtype), teacher_of(4 * torch.randn(n, v), k), torch.arange(n) % v
    result, gradient, expected, exact = both(z, labels, teacher, KDConfig())
    torch.testing.assert_close(result.loss.double(), expected, rtol=1e-5, atol=1e-5)
    rounding = 2e-6 if dtype == torch.float32 else 2**-8
    assert (gradient.double() - exact).abs().max() <= rounding


@pytest.mark.parametrize("scale", [1e4, 160.0, 0.0])
def test_huge_gaps_and_equal_logits(scale: float) -> None:
    torch.manual_seed(1)
    z = scale * torch.randn(6, 40).sign() + torch.randn(6, 40) * (scale > 0)
    teacher = teacher_of(torch.randn(6, 40), 7)
    labels = torch.arange(6)
    result, gradient, _, _ = both(z, labels, teacher, KDConfig(alpha=0.5))
    # The reference's probabilities underflow here, even in float64: logarithms do not.
    dense = z.double().requires_grad_()
    log_q = dense.log_softmax(1)
    outside = log_q.scatter(1, teacher.ids, -torch.inf).logsumexp(1, keepdim=True)
    log_q = torch.cat([log_q.gather(1, teacher.ids), outside], 1)
    assert teacher.logsumexp is not None
    log_p = (teacher.logits - teacher.logsumexp[:, None]).double()
    log_p = torch.cat([log_p, torch.log1p(-log_p.exp().sum(1, keepdim=True))], 1)
    kd = (log_p.exp() * (log_p - log_q)).sum(1)
    expected = 0.5 * kd + 0.5 * torch.nn.functional.cross_entropy(dense, labels, reduction="none")
    expected.sum().backward()
    assert dense.grad is not None
    torch.testing.assert_close(result.loss.double(), expected.detach(), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), dense.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shift", [30.0, -30.0])
def test_a_student_with_nearly_all_or_no_mass_in_the_k_still_learns(shift: float) -> None:
    """1 - Σq in float32 would be 0 or 1 exactly, and the gradient of the rest lost."""
    torch.manual_seed(2)
    teacher_z, z = torch.randn(4, 30), torch.randn(4, 30)
    teacher = teacher_of(teacher_z, 5)
    z = z.scatter_add(1, teacher.ids, torch.full((4, 5), shift))
    config = KDConfig(alpha=1.0)
    result, gradient, expected, exact = both(z, torch.zeros(4, dtype=torch.int64), teacher, config)
    torch.testing.assert_close(result.loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-4, atol=1e-7)
    assert gradient.abs().max() > 0.1


def test_a_teacher_with_all_mass_but_1e9th_in_the_k() -> None:
    z = torch.full((1, 20), 0.0)
    z[0, :3] = 24.0
    teacher = teacher_of(z, 3)
    result, gradient, expected, exact = both(
        torch.randn(1, 20), torch.tensor([0]), teacher, KDConfig()
    )
    torch.testing.assert_close(result.loss.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-5, atol=1e-6)


def test_infinite_padding_and_labels_outside_the_mask_do_not_matter() -> None:
    torch.manual_seed(3)
    z, mask = torch.randn(4, 12), torch.tensor([True, False, True, False])
    padded = torch.cat([z, torch.full((4, 4), -torch.inf)], 1).requires_grad_()
    labels = torch.tensor([3, -100, 5, 999])
    teacher = teacher_of(torch.randn(2, 12), 4)
    result = sft_kd_loss(padded, labels, teacher, KDConfig(), vocab_size=12, mask=mask)
    result.loss.sum().backward()
    expected = reference.sft_kd_loss(z[mask], labels[mask], teacher, KDConfig())[0]
    torch.testing.assert_close(result.loss[mask].double(), expected, rtol=1e-6, atol=1e-6)
    assert padded.grad is not None and padded.grad.isfinite().all()
    assert not padded.grad[~mask].any() and not padded.grad[:, 12:].any()


def test_padding_above_every_logit_is_not_of_the_teacher() -> None:
    z = torch.full((2, 16), -500.0)
    z[:, 12:] = 0.0  # Megatron's padding rows: zeros
    found = vocab_parallel_topk(z, 3, vocab_size=12)
    assert found.logsumexp is not None
    assert found.ids.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(found.logsumexp, torch.full((2,), -500.0) + torch.tensor(12.0).log())


def test_weights_of_zero_leave_a_term_out() -> None:
    torch.manual_seed(4)
    z, labels = torch.randn(5, 20), torch.arange(5)
    plain = sft_kd_loss(z, labels, None, KDConfig(alpha=0.0))
    torch.testing.assert_close(
        plain.loss, torch.nn.functional.cross_entropy(z, labels, reduction="none")
    )
    teacher = teacher_of(torch.randn(5, 20), 4)
    result = sft_kd_loss(z, labels, teacher, KDConfig(sft_weight=0.5, kd_weight=2.0))
    torch.testing.assert_close(result.loss, 0.5 * result.nll + 2.0 * result.kd)
    with pytest.raises(ValueError, match="there is no teacher"):
        sft_kd_loss(z, labels, None, KDConfig(alpha=0.5))


def test_a_label_off_by_one_shows() -> None:
    """A teacher sure of the next token, a student equal to it: only a misplaced label costs."""
    tokens = torch.tensor([4, 7, 1, 9, 3])
    z = torch.zeros(4, 12).scatter_(1, tokens[1:, None], 20.0)
    teacher = teacher_of(z, 3)
    config = KDConfig(alpha=0.5)
    right = sft_kd_loss(z, tokens[1:], teacher, config).loss
    wrong = sft_kd_loss(z, tokens[:-1], teacher, config).loss
    assert right.max() < 1e-5 and wrong.min() > 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": [[1, 1], [2, 3]]}, "Teacher row 0 has the same id twice"),
        ({"ids": [[1, 2], [2, 99]]}, "Teacher row 1 has an id outside"),
        ({"logits": [[2.0, 1.0], [float("nan"), 1.0]]}, "Teacher row 1 has a logit .* NaN"),
    ],
)
def test_a_damaged_teacher_is_refused_by_row(change: dict[str, object], message: str) -> None:
    values = {"ids": [[1, 2], [2, 3]], "logits": [[2.0, 1.0], [2.0, 1.0]], **change}
    teacher = TopK(
        ids=torch.tensor(values["ids"]),
        logits=torch.tensor(values["logits"]),
        logsumexp=torch.zeros(2) + 3,
    )
    with pytest.raises(ValueError, match=message):
        sft_kd_loss(torch.randn(2, 20), torch.tensor([0, 1]), teacher, KDConfig())


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"support": "buckets"}, "Did you mean 'bucket'"),
        ({"divergence": "kl"}, "expected one of forward_kl"),
        ({"alpha": 1.5}, "in \\[0, 1\\]"),
        ({"alpha": 0.5, "kd_weight": 1.0}, "both given"),
        ({"temperature": 0.0}, "> 0"),
        ({"divergence": "reverse_kl", "support": "vocab"}, "infinite"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings_: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KDConfig(**settings_)  # type: ignore[arg-type]


def test_inplace_takes_the_logits_memory_and_no_second_one() -> None:
    z = torch.randn(6, 30)
    leaf = z.clone().requires_grad_()
    logits = leaf * 1
    teacher = teacher_of(torch.randn(6, 30), 4)
    seen: list[int] = []
    logits.register_hook(lambda grad: seen.append(grad.data_ptr()))
    loss = sft_kd_loss(logits, torch.arange(6), teacher, KDConfig(), inplace=True).loss
    loss.sum().backward()
    assert seen == [logits.data_ptr()]


def test_chunks_of_the_fused_head_change_nothing() -> None:
    torch.manual_seed(5)
    hidden, weight = torch.randn(9, 6), torch.randn(33, 6)
    teacher, labels = teacher_of(torch.randn(9, 33), 5), torch.arange(9)
    results = []
    for chunk in (1, 4, 100):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = linear_sft_kd_loss(h, w, labels, teacher, KDConfig(), chunk_tokens=chunk).loss
        loss.mean().backward()
        assert h.grad is not None and w.grad is not None
        results.append((loss.detach(), h.grad, w.grad))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
