"""The primitive of every loss: chosen logits, and the log-sum-exp of all others.

    picked[n, m] = z[n, ids[n, m]]
    top[n]       = max_{v ∉ ids[n]} z[n, v]
    outside_T[n] = log Σ_{v ∉ ids[n]} exp((z[n, v] - top[n]) / T)

Every loss here is small algebra on these. The ordinary log-sum-exp is that of the picked and the
outside values together; the remainder of a top-K distribution is `outside` itself, with all its
digits, however small. Their gradient is one pass over the shard:

    dz = Σ_T d_outside_T / T · exp((z - top) / T - outside_T) [v ∉ ids]  +  scatter_add(d_picked)

(`top` only shifts, so that it needs no gradient: its own cancels in `outside_T + top / T`.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from nemo_kd.errors import NemoKDError
from nemo_kd.loss import kernels
from nemo_kd.loss.compiling import never_compiled
from nemo_kd.loss.rows import Rows
from nemo_kd.loss.shard import VocabShard


class Gathered(NamedTuple):
    """`picked` [N, M], one `outside` [N] for each temperature, `top` [N]; the same on every rank.

    float32 (float64 for float64 logits). Where nothing is outside, `outside` is -inf and `top`
    the lowest finite number.
    """

    picked: Tensor
    outside: tuple[Tensor, ...]
    top: Tensor


class PassState(NamedTuple):
    """Values that the backward pass needs from the forward pass: [N], or one [N] per temperature.

    `top` = this shard's largest logit outside; `norm` as in `ShardPass`; `share` = this shard's
    part in Σ_{v ∉ ids} exp(z / T), in [0, 1].
    """

    top: Tensor
    norm: list[Tensor]
    share: list[Tensor]


def gather_pass(
    logits: Rows,
    ids: Tensor,
    shard: VocabShard,
    temperatures: Sequence[float],
    keep: bool = False,
) -> tuple[Gathered, PassState]:
    """The forward pass without autograd.

    Two all-reduces: [N] maximum, [N, M + temperatures] sum in float64.

    Layout: logits sharded by column, `ids` [N, M] the same on every rank; so are the results.
    """
    local = kernels.choose(logits.matrix).forward(logits, ids, shard, temperatures, keep)
    top = shard.max(local.top.clone()).clamp_min_(torch.finfo(local.top.dtype).min)  # [N]
    dtype = top.dtype
    # In float64, so that combining the ranks adds no rounding to `outside`, of which divergences
    # take differences.
    log_sums = [
        log_sum.double() + (local.top.double() - top) / temperature  # -inf: nothing in this shard
        for log_sum, temperature in zip(local.log_sum, temperatures, strict=True)
    ]
    sums = torch.stack(log_sums, -1).exp()  # [N, temperatures]
    packed = shard.sum(torch.cat([local.picked.double(), sums], -1))  # [N, M + temperatures]
    picked, total = packed.split([ids.shape[1], len(temperatures)], -1)
    outside = total.log().unbind(-1)
    share = [
        torch.exp(a - b).nan_to_num_(0.0).to(dtype) for a, b in zip(log_sums, outside, strict=True)
    ]
    return Gathered(
        picked.to(dtype), tuple(log_sum.to(dtype) for log_sum in outside), top
    ), PassState(local.top, local.norm, share)


def logit_gradient(
    logits: Rows,
    ids: Tensor,
    shard: VocabShard,
    temperatures: Sequence[float],
    state: PassState,
    grad_picked: Tensor | None,
    grad_outside: Sequence[Tensor | None],
    out: Rows,
    softmax_kept: bool = False,
) -> None:
    """out ← the gradient of this rank's columns, zero in rows not chosen. No collective.

    `grad_outside`: one [N], or None for zero, for each temperature. `out` may be `logits`.
    """
    coefficients = [
        None if grad is None else grad * share / (norm * temperature)
        for grad, share, norm, temperature in zip(
            grad_outside, state.share, state.norm, temperatures, strict=True
        )
    ]
    kernels.choose(logits.matrix).backward(
        logits, ids, shard, temperatures, state.top, grad_picked, coefficients, out, softmax_kept
    )


class _Gather(torch.autograd.Function):
    """`gather_pass` with `logit_gradient` as its backward; the logits' memory may be reused."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        ids: Tensor,
        shard: VocabShard,
        temperatures: tuple[float, ...],
        positions: Tensor | None,
        inplace: bool,
    ) -> tuple[Tensor, ...]:
        rows = Rows.of(logits, positions)
        if len(ids) != len(rows):
            raise ValueError(f"ids have {len(ids)} rows, but {len(rows)} positions were chosen")
        # Over the logits, where that is allowed: then the backward pass needs no exponential.
        ctx.softmax_kept = (
            inplace
            and not _saved_tensors_are_hooked()
            and kernels.choose(logits).keeps_softmax(logits.dtype, temperatures)
        )
        ctx.inplace, ctx.shard, ctx.temperatures = inplace, shard, temperatures
        gathered, ctx.state = gather_pass(rows, ids, shard, temperatures, ctx.softmax_kept)
        ctx.rows = rows.over(torch.empty(0))
        ctx.save_for_backward(rows.matrix, ids)
        ctx.mark_non_differentiable(gathered.top)
        ctx.set_materialize_grads(False)
        return (gathered.picked, gathered.top, *gathered.outside)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_picked, _, *grad_outside = grads
        matrix, ids = ctx.saved_tensors
        rows = ctx.rows.over(matrix)
        out = rows if ctx.inplace else rows.over(torch.empty_like(matrix))
        logit_gradient(
            rows,
            ids,
            ctx.shard,
            ctx.temperatures,
            ctx.state,
            grad_picked,
            grad_outside,
            out,
            ctx.softmax_kept,
        )
        if ctx.inplace:
            increment_version(matrix)  # Triton's kernels do not
        return out.as_logits(), None, None, None, None, None


def _saved_tensors_are_hooked() -> bool:
    """Whether hooks such as those of activation checkpointing handle the tensors that are saved.

    Non-reentrant checkpointing runs the forward pass a second time, on the same logits. Where torch
    cannot tell, True.
    """
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(False) is not None


def gather(
    logits: Tensor,
    ids: Tensor,
    shard: VocabShard,
    *,
    temperatures: tuple[float, ...] = (1.0,),
    positions: Tensor | None = None,
    inplace: bool = False,
) -> Gathered:
    """`gather_pass` under autograd: logits [*, Vp], ids [N, M], at N `positions` or all.

    Unless `inplace`, the logits stay as they are and the gradient is a new tensor. With it, and
    where the gradient is recorded, the passes write over the logits and the gradient takes their
    memory, for one backward pass. The gradient is zero at the other positions, which cost nothing.
    """
    # Not in a pass without gradients, such as the first one of reentrant activation checkpointing:
    # its logits are needed again.
    inplace = inplace and torch.is_grad_enabled() and logits.requires_grad
    apply: Callable[..., tuple[Tensor, ...]] = _Gather.apply
    picked, top, *outside = apply(logits, ids, shard, temperatures, positions, inplace)
    return Gathered(picked, tuple(outside), top)


@never_compiled
def gather_logits_and_logsumexp(
    logits: Tensor,
    ids: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """(picked [*, M], logsumexp [*]) with picked = z[ids], logsumexp = log Σ_v exp(z_v).

    Layout: logits [*, Vp] are this rank's columns (float32, bf16, fp16 or float64; any strides);
    `ids` [*, M] int64 and both results are the same on every rank of `group`, float32 (float64
    for float64 logits), in nats. Ids may repeat. Columns ≥ `vocab_size` are padding and do not
    count. Forward: two all-reduces, [N] and [N, M + 1]; backward: none. The gradient comes in the
    logits' dtype; with `inplace` it is written over the logits (see `sft_kd_loss`), else they stay
    as they are. The graph then allows one backward pass, since its memory becomes the gradient.

    Errors: NemoKDError for shapes that do not match, or a `vocab_size` the shards cannot hold.
    """
    if ids.shape[:-1] != logits.shape[:-1]:
        raise NemoKDError(
            f"ids {tuple(ids.shape)} and logits {tuple(logits.shape)} differ in their leading "
            "dimensions: give ids [*, M] for logits [*, Vp]."
        )
    shard = VocabShard.of(logits.shape[-1], group, vocab_size)
    flat = ids.reshape(-1, ids.shape[-1])  # [N, M]
    gathered = gather(logits, flat, shard, inplace=inplace)
    once = gathered.picked.masked_fill(~first_occurrence(flat), -torch.inf)  # [N, M]
    rest = gathered.outside[0] + gathered.top
    total = torch.logsumexp(torch.cat([once, rest.unsqueeze(-1)], -1), -1)
    return gathered.picked.view(ids.shape), total.view(ids.shape[:-1])


def first_occurrence(ids: Tensor) -> Tensor:
    """[N, M] bool: True at one column for each distinct id of a row."""
    ordered, column = ids.sort(dim=-1, stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.empty_like(first).scatter_(-1, column, first)
