"""The two passes over a vocabulary shard in plain torch, a cache-sized chunk of rows at a time.

Both see the logits z with the gathered ids taken out ("holes", set to -inf), so that what is left
is summed on its own: a tail of 1e-30 keeps every digit, which `total - gathered` would lose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nemo_kd.loss.rows import Rows, row_chunks
from nemo_kd.loss.shard import VocabShard

LOG2_E = math.log2(math.e)


class ShardPass(NamedTuple):
    """One rank's result of the forward pass; outside = its real columns that are not in ids.

    `picked` [N, M] is 0 where the id is on another rank; `top` [N] = max z outside, -inf where
    nothing is; `norm[i]` [N] = Σ exp((z - top) / temperatures[i]) outside, which `backward` divides
    its exponentials by, and `log_sum[i]` [N] its logarithm.
    """

    picked: Tensor
    top: Tensor
    log_sum: list[Tensor]
    norm: list[Tensor]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precision; float32 and float64 are unchanged."""
    return torch.promote_types(dtype, torch.float32)


def keeps_softmax(dtype: torch.dtype, temperatures: Sequence[float]) -> bool:
    """Whether the forward pass keeps its exponentials for the backward pass.

    In half precision it would be rounded twice, and the memory has room for one temperature only.
    """
    return len(temperatures) == 1 and dtype == compute_dtype(dtype)


def forward(
    logits: Rows,
    ids: Tensor,
    shard: VocabShard,
    temperatures: Sequence[float],
    keep: bool = False,
) -> ShardPass:
    """One read of the logits: gather, maximum and log-sum-exp.

    Shapes: `ids` [N, M] int64. With `keep` the shard's softmax times `norm` is written over the
    logits (see `keeps_softmax`). Everything is computed in float32, or float64 for float64 logits.
    """
    width, dtype = shard.width, compute_dtype(logits.matrix.dtype)
    picked = ids.new_empty(ids.shape, dtype=dtype)
    top = picked.new_empty(len(ids))
    norms = [torch.empty_like(top) for _ in temperatures]
    scratch = None
    for part in row_chunks(len(ids), width, ids.device):
        work = logits.view(part) if keep else None  # [n, Vp]
        in_memory = work is not None
        if work is None:
            scratch = picked.new_empty(part.stop, width) if scratch is None else scratch
            work = scratch[: part.stop - part.start].copy_(logits.read(part))
        column, here = shard.local(ids[part])
        picked[part] = work.gather(1, column).masked_fill_(~here, 0)
        _open_holes(work, column, here, shard)
        top[part] = work.amax(-1)
        shift = finite_top(work, top[part])
        for i, temperature in enumerate(temperatures):
            soft = exponentials(work, shift, temperature, last=i == len(temperatures) - 1)
            torch.sum(soft, -1, out=norms[i][part])
        if keep and not in_memory:
            logits.write(part, soft)
    return ShardPass(picked, top, [norm.log() for norm in norms], norms)


def backward(
    logits: Rows,
    ids: Tensor,
    shard: VocabShard,
    temperatures: Sequence[float],
    top: Tensor,
    grad_picked: Tensor | None,
    coefficients: Sequence[Tensor | None],
    out: Rows,
    softmax_kept: bool = False,
) -> None:
    """out ← Σ_i coefficients[i] · norm[i] · softmax_i  +  scatter_add(grad_picked).

    softmax_i is that of z / temperatures[i] over what is outside in this shard. One read, one
    write. `top` [N] is the forward pass's; `coefficients[i]` [N] or None for zero; `grad_picked`
    [N, M]. `out` may be `logits` itself; with `softmax_kept` it holds what `forward` kept.
    """
    scratch = None
    for part in row_chunks(len(ids), shard.width, ids.device):
        column, here = shard.local(ids[part])
        target = out.view(part) if softmax_kept else None
        if target is not None:
            grad = _scale(target, coefficients[0], part)
        elif softmax_kept:
            grad = _scale(out.read(part), coefficients[0], part)
        else:
            dtype = compute_dtype(logits.matrix.dtype)
            if scratch is None:
                scratch = logits.matrix.new_empty(part.stop, shard.width, dtype=dtype)
            work = scratch[: part.stop - part.start].copy_(logits.read(part))  # [n, Vp]
            _open_holes(work, column, here, shard)
            shift = finite_top(work, top[part])
            grad = _mix(work, shift, temperatures, coefficients, part)
        if grad_picked is not None:
            grad.scatter_add_(1, column, grad_picked[part].masked_fill(~here, 0))
        if target is None:
            out.write(part, grad)
    out.clear_others()


def finite_top(work: Tensor, top: Tensor) -> Tensor:
    """`top` [n], the rows' maxima, with 0 for rows that are all -inf, which get one finite entry.

    So their sum of exponentials is 1 instead of 0. Their weight stays zero, since their `top` is
    -inf.
    """
    empty = top == -torch.inf
    work[:, 0].masked_fill_(empty, 0)
    return top.masked_fill(empty, 0)


def _open_holes(work: Tensor, column: Tensor, here: Tensor, shard: VocabShard) -> None:
    """work ← -inf at this shard's ids and padding columns."""
    work[:, shard.valid :] = -torch.inf
    # The minimum with +inf changes nothing: ids of other ranks need no column of their own.
    holes = torch.full_like(column, torch.inf, dtype=work.dtype).masked_fill_(here, -torch.inf)
    work.scatter_reduce_(1, column, holes, "amin")


def exponentials(work: Tensor, top: Tensor, temperature: float, last: bool = False) -> Tensor:
    """exp((work - top) / temperature) [n, Vp]: over `work` if `last`, else in new memory.

    By `exp2`, which torch vectorizes on every CPU: `exp` may take three times as long. The
    difference comes first: it is small where the exponential is large.
    """
    shifted = torch.sub(work, top.unsqueeze(1), out=work if last else None)
    return shifted.mul_(LOG2_E / temperature).exp2_()


def _scale(soft: Tensor, coefficient: Tensor | None, part: slice) -> Tensor:
    return soft.zero_() if coefficient is None else soft.mul_(coefficient[part].unsqueeze(1))


def _mix(
    work: Tensor,
    top: Tensor,
    temperatures: Sequence[float],
    coefficients: Sequence[Tensor | None],
    part: slice,
) -> Tensor:
    """Σ_i coefficients[i] · exp((work - top) / temperatures[i]) [n, Vp]; overwrites `work`."""
    used = [(t, c) for t, c in zip(temperatures, coefficients, strict=True) if c is not None]
    total = None
    for i, (temperature, coefficient) in enumerate(used):
        soft = exponentials(work, top, temperature, last=i == len(used) - 1)
        soft.mul_(coefficient[part].unsqueeze(1))
        total = soft if total is None else total.add_(soft)
    return work.zero_() if total is None else total
