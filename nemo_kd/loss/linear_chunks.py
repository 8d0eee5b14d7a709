"""LM head, loss and gradients a chunk of tokens at a time, without autograd.

z = softcap(scale · h Wᵀ),    dh = dz W,    dW = dzᵀ h

dz is computed for a gradient of 1 and stored in z's dtype. In fp16 its entries below 6e-8 are
therefore 0: a loss scale, which multiplies dh and dW afterwards, does not keep them. bf16 has the
range of float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nemo_kd.loss import kernels
from nemo_kd.loss.config import KDConfig
from nemo_kd.loss.primitive import Gathered, gather_pass, logit_gradient
from nemo_kd.loss.rows import Rows
from nemo_kd.loss.shard import VocabShard
from nemo_kd.loss.terms import token_terms
from nemo_kd.loss.weights import Weights, combine
from nemo_kd.topk import TopK


@dataclass(frozen=True, kw_only=True)
class LinearHead:
    """Settings that all chunks share."""

    shard: VocabShard
    config: KDConfig
    scale: float
    softcap: float | None
    chunk_tokens: int
    sequence_parallel: bool
    equal_gradients: bool

    def logits(self, hidden: Tensor, weight: Tensor, z: Tensor) -> Tensor | float:
        """z [n, Vp] ← the logits; the slope dz / d(h Wᵀ): [n, Vp], or a number if constant."""
        torch.mm(hidden, weight.t(), out=z)
        if self.scale != 1:
            z *= self.scale
        if self.softcap is None:
            return self.scale
        z.div_(self.softcap).tanh_()
        slope = (1 - z * z).mul_(self.scale)
        z *= self.softcap
        return slope


class Values(NamedTuple):
    """Per-token values [N], detached."""

    loss: Tensor
    nll: Tensor
    kd: Tensor
    metrics: dict[str, Tensor]


class LinearPass(NamedTuple):
    """Values, and the gradients of Σ token_weight · loss where they are needed."""

    loss: Tensor
    nll: Tensor
    kd: Tensor
    metrics: dict[str, Tensor]
    grad_hidden: Tensor | None
    grad_weight: Tensor | None


def linear_pass(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    teacher: TopK | None,
    head: LinearHead,
    weights: Weights,
    token_weight: Tensor | None,
    needed: tuple[bool, bool],
) -> LinearPass:
    """Values and gradients of hidden [N, H], weight [Vp, H]; `ids` [N, 1 + K], label first.

    `weights`: those of the two losses. `token_weight` [N], None for ones. `grad_hidden` is this
    rank's part of a sum over the ranks; `grad_weight` is in float32 at least. Collectives: two
    all-reduces a chunk.
    """
    grad_hidden = torch.empty_like(hidden) if needed[0] else None
    grad_weight: Tensor | None = None
    results = []
    # One empty chunk if there is no token: the results need their dtypes.
    chunks = max(1, -(-len(ids) // head.chunk_tokens))
    size = max(1, -(-len(ids) // chunks))  # equal chunks: a short last one would be inefficient
    memory = hidden.new_empty(size, len(weight))
    for start in range(0, max(len(ids), 1), size):
        part = slice(start, start + size)
        scale = None if token_weight is None else token_weight[part]
        z = memory[: len(hidden[part])]
        slope = head.logits(hidden[part], weight, z)
        both = weights[part] if isinstance(weights, Tensor) else weights
        rows = None if teacher is None else teacher[part]
        results.append(_chunk(z, ids[part], rows, head, both, scale, any(needed)))
        if any(needed) and not (isinstance(slope, float) and slope == 1):  # z is now dz
            z *= slope
        if grad_hidden is not None:
            torch.mm(z, weight, out=grad_hidden[part])
        if needed[1]:
            grad_weight = _add_product(grad_weight, z, hidden[part])
    loss, nll, kd = (torch.cat([getattr(r, name) for r in results]) for name in Values._fields[:3])
    metrics = {name: torch.cat([r.metrics[name] for r in results]) for name in results[0].metrics}
    return LinearPass(loss, nll, kd, metrics, grad_hidden, grad_weight)


def _chunk(
    z: Tensor,
    ids: Tensor,
    teacher: TopK | None,
    head: LinearHead,
    both: Weights,
    token_weight: Tensor | None,
    needed: bool,
) -> Values:
    """The values of a chunk's tokens; if needed, z [n, Vp] ← d Σ token_weight · loss / dz."""
    rows, temperatures, size = Rows.of(z), head.config.temperatures, head.shard.size
    keeps = needed and kernels.choose(z).keeps_softmax(z.dtype, temperatures)
    gathered, state = gather_pass(rows, ids, head.shard, temperatures, keeps)
    if not needed:
        nll, kd, metrics = token_terms(gathered, ids, teacher, head.config, size)
        return Values(combine(nll, kd, both), nll, kd, metrics)
    with torch.enable_grad():
        picked, *outside = (x.requires_grad_() for x in (gathered.picked, *gathered.outside))
        gathered = Gathered(picked, tuple(outside), gathered.top)
        nll, kd, metrics = token_terms(gathered, ids, teacher, head.config, size)
        loss = combine(nll, kd, both)
        weights = torch.ones_like(loss) if token_weight is None else token_weight.to(loss.dtype)
        grads = torch.autograd.grad(loss, (picked, *outside), weights, allow_unused=True)
    logit_gradient(
        rows, ids, head.shard, temperatures, state, grads[0], grads[1:], rows, softmax_kept=keeps
    )
    return Values(loss.detach(), nll.detach(), kd.detach(), metrics)


def _add_product(total: Tensor | None, dz: Tensor, hidden: Tensor) -> Tensor:
    """total + dzᵀ h [Vp, H], in float32 at least and in total's memory; None for no total yet."""
    wider = torch.promote_types(dz.dtype, torch.float32)
    if total is None:
        return (dz.t() @ hidden).to(wider)
    return total.addmm_(dz.t(), hidden) if dz.dtype == wider else total.add_(dz.t() @ hidden)
