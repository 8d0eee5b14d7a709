"""The primitive's gradient, and what happens to the logits' memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nemo_kd.loss import (
    DIVERGENCES,
    SUPPORTS,
    KDConfig,
    TopK,
    gather_logits_and_logsumexp,
    reference,
    sft_kd_loss,
)
from tests.loss.sharded import single

IDS = torch.tensor([[0, 0, 8], [3, 1, 3], [2, 4, 6], [8, 8, 8]])  # some twice, some all the same


def teacher_rows(n: int, v: int, k: int, temperature: float = 1.0) -> TopK:
    return single(reference.topk(torch.randn(n, v), k, temperature))


def test_gradcheck_of_the_primitive() -> None:
    torch.manual_seed(0)
    z = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gather_logits_and_logsumexp(x, IDS), z)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck_of_the_loss(divergence: str, support: str, temperature: float) -> None:
    if (divergence, support) == ("reverse_kl", "vocab"):
        pytest.skip("infinite, and refused by KDConfig")
    torch.manual_seed(0)
    z = torch.randn(3, 11, dtype=torch.float64, requires_grad=True)
    exact = reference.topk(torch.randn(3, 11, dtype=torch.float64), 4, temperature)
    config = KDConfig(divergence=divergence, support=support, temperature=temperature)
    labels = torch.tensor([0, 5, 10])
    assert torch.autograd.gradcheck(lambda x: sft_kd_loss(x, labels, exact, config).loss, z)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda z: z,
    "batch first": lambda z: z.transpose(0, 1).contiguous().transpose(0, 1),
    "columns of a wider matrix": lambda z: torch.cat([z, z], -1)[..., : z.shape[-1]],
    "every second row": lambda z: z.repeat_interleave(2, 0)[::2],
    "vocabulary first": lambda z: z.movedim(-1, 0).contiguous().movedim(0, -1),
    "one row for all": lambda z: z[:1, :1].expand_as(z),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_change_nothing(layout: str, masked: bool, inplace: bool) -> None:
    torch.manual_seed(0)
    z = LAYOUTS[layout](torch.randn(5, 3, 20))
    mask = torch.rand(5, 3) < 0.6 if masked else None
    rows = 15 if mask is None else int(mask.sum())
    labels, teacher = torch.arange(15).view(5, 3), teacher_rows(rows, 20, 4)
    seen: list[torch.Tensor] = []
    results = []
    for logits, reuse in ((z, inplace), (z.clone(memory_format=torch.contiguous_format), False)):
        logits = logits.detach().requires_grad_()
        loss = sft_kd_loss(logits, labels, teacher, KDConfig(), mask=mask, inplace=reuse).loss
        loss.sum().backward()
        assert logits.grad is not None and logits.grad.shape == z.shape
        results.append(loss)
        seen.append(logits.grad)
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-5, atol=1e-7)


def test_what_stands_at_masked_positions_is_never_read() -> None:
    torch.manual_seed(0)
    z, mask = torch.randn(6, 20), torch.tensor([True, False, True, True, False, False])
    z[~mask] = torch.nan
    for inplace in (False, True):
        logits = z.clone().requires_grad_()
        labels = torch.where(mask, 3, -100)
        teacher = teacher_rows(3, 20, 4)
        result = sft_kd_loss(logits, labels, teacher, KDConfig(), mask=mask, inplace=inplace)
        result.loss.sum().backward()
        assert logits.grad is not None
        assert result.loss.isfinite().all() and logits.grad.isfinite().all()
        assert not logits.grad[~mask].any() and logits.grad[mask].any(-1).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_order_of_two_losses_on_the_same_logits_does_not_matter(
    dtype: torch.dtype, temperature: float
) -> None:
    torch.manual_seed(0)
    z, labels = torch.randn(5, 20).to(dtype), torch.arange(5)
    teacher = teacher_rows(5, 20, 4, temperature)
    results = []
    for first in (True, False):
        logits = z.clone().requires_grad_()
        shared = logits * 1

        def kd(shared: torch.Tensor) -> torch.Tensor:
            return sft_kd_loss(shared, labels, teacher, KDConfig(temperature=temperature)).loss

        def ce(shared: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(shared, labels, reduction="none")

        losses = [one(shared) for one in ((kd, ce) if first else (ce, kd))]
        assert torch.equal(shared.detach(), z)
        sum(loss.float().sum() for loss in losses).backward()  # type: ignore[union-attr]
        assert torch.equal(shared.detach(), z) and logits.grad is not None
        results.append(logits.grad)
    assert torch.equal(results[0], results[1])


def test_a_second_backward_pass_works_unless_the_memory_was_reused() -> None:
    torch.manual_seed(0)
    z, labels, teacher = torch.randn(5, 20), torch.arange(5), teacher_rows(5, 20, 4)
    for inplace in (False, True):
        logits = z.clone().requires_grad_()
        loss = sft_kd_loss(logits * 1, labels, teacher, KDConfig(), inplace=inplace).loss.sum()
        (once,) = torch.autograd.grad(loss, logits, retain_graph=True)
        if inplace:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(loss, logits)
        else:
            assert torch.equal(torch.autograd.grad(loss, logits)[0], once)


def test_a_loss_in_place_spoils_no_other_silently() -> None:
    """What else needs the logits for its gradient gets an error, never wrong numbers."""
    torch.manual_seed(0)
    logits = torch.randn(5, 20, requires_grad=True) * 1
    other = logits.square().sum()
    loss = sft_kd_loss(
        logits, torch.arange(5), teacher_rows(5, 20, 4), KDConfig(), inplace=True
    ).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss.sum() + other).backward()


def test_half_precision_errs_by_the_rounding_of_the_gradient() -> None:
    """float32 inside: the loss is exact for these logits, the gradient rounded once."""
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        z = torch.randn(9, 300).mul(3).to(dtype)
        labels, teacher = torch.arange(9), teacher_rows(9, 300, 20)
        logits = z.clone().requires_grad_()
        loss = sft_kd_loss(logits, labels, teacher, KDConfig()).loss
        loss.sum().backward()
        dense = z.double().requires_grad_()
        expected = reference.sft_kd_loss(dense, labels, teacher, KDConfig())[0]
        expected.sum().backward()
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
        assert logits.grad is not None and dense.grad is not None
        half_ulp = torch.finfo(dtype).eps / 2
        smallest = torch.finfo(dtype).smallest_normal  # below it float16 has fewer digits
        error = (logits.grad.double() - dense.grad).abs()
        assert (error <= 1.01 * half_ulp * dense.grad.abs().clamp_min(smallest) + 1e-7).all()
