"""What a check in `ranks.Ranks` needs: each rank's columns of seeded logits, and the reference."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

from nemo_kd.loss import KDConfig, TopK, reference


def group() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world


def columns(width: int) -> slice:
    """This rank's columns of a vocabulary padded to `width`."""
    each = width // dist.get_world_size()
    return slice(dist.get_rank() * each, (dist.get_rank() + 1) * each)


def padded(vocab_size: int) -> int:
    """Megatron's padding: a multiple of the ranks, and never the vocabulary itself."""
    ranks = dist.get_world_size()
    return (vocab_size // ranks + 2) * ranks


def student_logits(
    shape: tuple[int, ...], vocab_size: int, dtype: torch.dtype, seed: int
) -> torch.Tensor:
    """[*shape, padded]: padding columns far above every real logit, where they would show."""
    generator = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(*shape, padded(vocab_size), generator=generator)
    z[..., vocab_size:] = 50.0
    return z.to(dtype)


def teacher_rows(rows: int, vocab_size: int, k: int, temperature: float, seed: int) -> TopK:
    generator = torch.Generator().manual_seed(seed + 1000)
    z = 3 * torch.randn(rows, vocab_size, generator=generator)
    return single(reference.topk(z, k, temperature))


def single(teacher: TopK) -> TopK:
    """The same rows in float32, as a store gives them."""
    return replace(teacher, logits=teacher.logits.float(), logsumexp=teacher.logsumexp.float())


def dense_gradient(
    logits: torch.Tensor,
    labels: torch.Tensor,
    teacher: TopK,
    config: KDConfig,
    weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss [N] and d(Σ weight · loss)/d logits [N, V] of the dense reference, float64."""
    z = logits.double().requires_grad_()
    loss = reference.sft_kd_loss(z, labels, teacher, config)[0]
    (loss * weight.double()).sum().backward()
    assert z.grad is not None
    return loss.detach(), z.grad
