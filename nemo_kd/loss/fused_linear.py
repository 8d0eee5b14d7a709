"""LM head and loss in one pass, a chunk of tokens at a time: [N, Vp] logits are never allocated.

    z = softcap(scale · h Wᵀ),    dh = dz W,    dW = dzᵀ h

A token's loss depends on its own logits only, and callers nearly always weight all tokens of a
micro-batch equally. So the forward pass computes the gradient of Σ loss while it has the logits,
and the backward pass multiplies it by the common weight: three matrix products, as many as without
fusion. If the tokens' weights differ, the backward pass repeats the passes over the chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_kd.errors import NemoKDError
from nemo_kd.loss.compiling import never_compiled
from nemo_kd.loss.config import KDConfig
from nemo_kd.loss.linear_chunks import LinearHead, LinearPass, linear_pass
from nemo_kd.loss.objective import (
    KDLoss,
    checked_teacher,
    chosen_positions,
    gather_ids,
    scatter_back,
)
from nemo_kd.loss.schedule import refuse_scheduled
from nemo_kd.loss.shard import VocabShard
from nemo_kd.topk import TopK

CHUNK_ELEMENTS = {"cpu": 9 << 20}
"""Number of logits in a chunk: enough tokens for efficient matrix products."""
DEFAULT_CHUNK_ELEMENTS = 1 << 27


@never_compiled
def linear_sft_kd_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher: TopK | None,
    config: KDConfig,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    sequence_parallel: bool = False,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    chunk_tokens: int | None = None,
    equal_gradients: bool = False,
) -> KDLoss:
    """`sft_kd_loss` of logits z = softcap(logit_scale · hidden weightᵀ) that are never stored.

    softcap(z) = c · tanh(z / c) for `logit_softcap` c. Only `loss` has a gradient: `nll`, `kd` and
    the metrics are for reporting.

    Layout: weight [Vp, H] are this rank's rows; labels [*], mask [*], weights and the teacher are
    as in `sft_kd_loss`. It replaces Megatron's ColumnParallelLinear and takes over
    its communication: without `sequence_parallel`, hidden [*, H] is the same on every rank, and so
    is its gradient, summed over `group` here. With it, hidden [s / ranks, b, H] is this rank's part
    of the sequence (labels [s, b] are of all of it) and so is its gradient. Do not wrap hidden in
    Megatron's `copy_to` or `gather_from` regions: the gradient would be summed twice. The weight's
    gradient is this rank's own. Under autocast the products are in its dtype, as for a linear
    layer; the weight's gradient adds up in float32 over the chunks, in memory [Vp, H] of its own
    from the forward to the backward pass, also if the weight has Megatron's `main_grad`, which a
    separate LM head with `gradient_accumulation_fusion` would add to.

    `chunk_tokens`: tokens per chunk (by default as many as give 9 · 10⁶ logits on a CPU, 2²⁷ on a
    GPU). Only one chunk's logits exist at a time, or twice that with a soft-cap.

    `equal_gradients`: the caller's promise that all tokens' losses get the same gradient, as from a
    sum or a mean over them. Without it the backward pass compares them, for which a GPU makes the
    host wait; a broken promise gives gradients of NaN.

    Collectives: two all-reduces a chunk, as `sft_kd_loss`; backward one all-reduce of [N, H], or a
    reduce-scatter; `sequence_parallel` adds an all-gather of hidden.

    Errors: as `sft_kd_loss`, and NemoKDError for shapes of hidden and weight that do not match, and
    for a `logit_softcap` that is not positive.
    """
    refuse_scheduled(config)
    if hidden.shape[-1] != weight.shape[-1]:
        raise NemoKDError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} differ in their last "
            "dimension: give hidden [*, H] and weight [Vp, H]."
        )
    if logit_softcap is not None and not logit_softcap > 0:
        raise NemoKDError(
            f"logit_softcap is {logit_softcap}: expected a positive number, or None for no cap."
        )
    shard = VocabShard.of(len(weight), group, None if config.count_padding else vocab_size)
    lead = list(hidden.shape[:-1])
    if sequence_parallel:
        lead[0] *= 1 if shard.group is None else dist.get_world_size(shard.group)
    positions = chosen_positions(torch.Size(lead), labels, positions, mask)
    teacher = checked_teacher(teacher, config, weights)
    ids = gather_ids(labels, positions, teacher, config, vocab_size or shard.size, weights)
    if chunk_tokens is None:
        budget = CHUNK_ELEMENTS.get(hidden.device.type, DEFAULT_CHUNK_ELEMENTS)
        chunk_tokens = max(1, budget // len(weight))
    head = LinearHead(
        shard=shard,
        config=config,
        scale=logit_scale,
        softcap=logit_softcap,
        chunk_tokens=chunk_tokens,
        sequence_parallel=sequence_parallel,
        equal_gradients=equal_gradients,
    )
    metrics: dict[str, Tensor] = {}
    if not torch.is_grad_enabled():  # the forward pass computes gradients wherever one is required
        hidden, weight = hidden.detach(), weight.detach()
    apply: Callable[..., tuple[Tensor, ...]] = _LinearLoss.apply
    values = apply(hidden, weight, ids, positions, teacher, head, weights, metrics)
    loss, nll, kd = (scatter_back(value, positions, labels.shape) for value in values)
    return KDLoss(loss, nll, kd, metrics)


class _LinearLoss(torch.autograd.Function):
    """(loss, nll, kd) [N] of hidden and weight; the metrics go into the dictionary given."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        ids: Tensor,
        positions: Tensor | None,
        teacher: TopK | None,
        head: LinearHead,
        weights: Tensor | None,
        metrics: dict[str, Tensor],
    ) -> tuple[Tensor, ...]:
        # The backward pass runs outside of autocast, but has to use the same dtype.
        ctx.dtype = _product_dtype(hidden)
        ctx.positions, ctx.teacher, ctx.head = positions, teacher, head
        ctx.weights = head.config.weights if weights is None else weights
        result = _all_chunks(ctx, hidden, weight, ids, None, ctx.needs_input_grad[:2])
        ctx.gradients = result.grad_hidden, result.grad_weight
        ctx.save_for_backward(hidden, weight, ids)
        ctx.mark_non_differentiable(result.nll, result.kd)
        metrics.update(result.metrics)
        return result.loss, result.nll, result.kd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, ids = ctx.saved_tensors
        if ctx.gradients is None:
            raise RuntimeError("linear_sft_kd_loss keeps its gradient for one backward pass only")
        grad_hidden, grad_weight = ctx.gradients
        ctx.gradients = None
        scale = _common_gradient(grad, ctx.head.equal_gradients) if len(grad) else None
        if len(grad) and scale is None:
            result = _all_chunks(ctx, hidden, weight, ids, grad, ctx.needs_input_grad[:2])
            grad_hidden, grad_weight = result.grad_hidden, result.grad_weight
        elif scale is not None:
            for gradient in (grad_hidden, grad_weight):
                if gradient is not None:
                    gradient.mul_(scale)
        if grad_hidden is not None:
            grad_hidden = _reduce_hidden(grad_hidden, hidden, ctx.positions, ctx.head)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _common_gradient(grad: Tensor, promised: bool) -> Tensor | None:
    """The value that all entries of grad [N] have; None if they differ.

    If equal entries are `promised`, nothing waits for the comparison: NaN instead of None.
    """
    equal = (grad == grad[0]).all()
    if promised:
        return torch.where(equal, grad[0], torch.nan)
    return grad[0] if bool(equal) else None


def _all_chunks(
    ctx: Any,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    token_weight: Tensor | None,
    needed: tuple[bool, bool],
) -> LinearPass:
    """`linear_pass` over the chosen positions of the complete sequence."""
    with _without_autocast(hidden.device.type):
        flat = _complete_sequence(hidden.detach(), ctx.head)
        chosen = flat if ctx.positions is None else flat[ctx.positions]  # [N, H]
        return linear_pass(
            chosen.to(ctx.dtype),
            weight.detach().to(ctx.dtype),
            ids,
            ctx.teacher,
            ctx.head,
            ctx.weights,
            token_weight,
            needed,
        )


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype that a linear layer would compute in: autocast's if it is enabled."""
    kind = hidden.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else hidden.dtype


def _without_autocast(kind: str) -> AbstractContextManager[Any]:
    available = torch.amp.is_autocast_available(kind)
    return torch.autocast(kind, enabled=False) if available else nullcontext()


def _complete_sequence(hidden: Tensor, head: LinearHead) -> Tensor:
    """[R, H]: all positions; under sequence parallelism all-gathered along the first dimension."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    group = head.shard.group
    if group is None or not head.sequence_parallel:
        return flat
    parts = [torch.empty_like(flat) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, flat.contiguous(), group=group)
    return torch.cat(parts)


def _reduce_hidden(
    grad: Tensor, hidden: Tensor, positions: Tensor | None, head: LinearHead
) -> Tensor:
    """The gradient of hidden in its shape, from this rank's [N, H] at the chosen positions."""
    group = head.shard.group
    scattered = group is not None and head.sequence_parallel
    if not scattered:
        head.shard.sum(grad)
    ranks = dist.get_world_size(group) if scattered else 1
    rows = ranks * (hidden.numel() // hidden.shape[-1])
    if positions is not None:
        grad = grad.new_zeros(rows, grad.shape[-1]).index_copy_(0, positions, grad)
    if scattered:
        complete, grad = grad, grad.new_empty(rows // ranks, grad.shape[-1])
        dist.reduce_scatter_tensor(grad, complete, group=group)
    return grad.view(hidden.shape).to(hidden.dtype)
