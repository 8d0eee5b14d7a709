"""Random draws from the teacher's full distribution over a sharded vocabulary.

    p_hat(v) = count_v / draws,   E[p_hat(v)] = p(v),   Σ_v count_v = draws

After *Sparse Logit Sampling* (Anshumann et al. 2025, arXiv 2503.16870), which draws independently.
Here the draws of a token are evenly spaced from one random number u: with P the cumulative
probability, draw j is the v with `P(v - 1) <= (j + u) / draws < P(v)`. A count is then within 1 of
`draws * p(v)`: equally unbiased, and of no larger variance for any token.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_kd.loss.shard import VocabShard
from nemo_kd.store.splitmix import GOLDEN, counter, mixed, unit
from nemo_kd.topk import ABSENT_ID, TopK


@torch.no_grad()
def vocab_parallel_sample(
    logits: Tensor,
    draws: int,
    uniform: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> TopK:
    """Draw `draws` times from each row; return distinct ids and frequencies for profile `sampled`.

    Layout in: logits [N, Vp] are this rank's columns of the vocabulary; columns ≥ `vocab_size` are
    padding and never drawn. uniform [N] float64 in [0, 1) must be the same on every rank. Layout
    out, the same on every rank: ids [N, draws] int64 by descending count (ties to the lower id),
    then -1; logits `log(count / draws)` float32, then -inf; logsumexp [N] zeros. Rows with NaN or
    +inf, or whose logits are all -inf, get NaN logits. The number of shards affects the result only
    through rounding of float64 sums. Memory: 8 bytes per logit. Collectives: an all-reduce and an
    all-gather of [N], an all-reduce of [N, draws].

    Raises ValueError if draws is below 1 or `uniform` has another shape.
    """
    if draws < 1:
        raise ValueError(f"draws is {draws}: expected at least 1.")
    if uniform.shape != logits.shape[:1]:
        raise ValueError(
            f"uniform is {list(uniform.shape)}, expected [{len(logits)}]: one for each row."
        )
    shard = VocabShard.of(logits.shape[-1], group, vocab_size)
    mass, before, total = _cumulative(logits, shard)
    steps = torch.arange(draws, dtype=torch.float64, device=logits.device)
    points = (steps + uniform.to(logits.device).unsqueeze(-1)) / draws * total  # [N, draws]
    # Keep rounding from moving the last point onto the end of the last interval.
    points = torch.minimum(points, torch.nextafter(total, torch.zeros_like(total)))
    after = before + (mass[:, -1:] if mass.shape[-1] else torch.zeros_like(total))
    here = (points >= before) & (points < after)
    ids = torch.full_like(points, ABSENT_ID, dtype=torch.int64)
    if mass.shape[-1]:
        column = torch.searchsorted(mass, points - before, right=True)
        column = torch.minimum(column, _last_possible(mass))
        ids = torch.where(here, column + shard.start, ids)
    topk = _counted(shard.max(ids))
    topk.logits.masked_fill_(~total.isfinite(), torch.nan)
    return topk


def _cumulative(logits: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor, Tensor]:
    """Return three float64 tensors of unnormalised probability masses Σ exp(z - max).

    The cumulative mass within this shard [N, valid], the total of the preceding shards [N, 1] and
    the total of all shards [N, 1]. Ranks compute the totals from the same gathered numbers.
    """
    valid = logits[:, : shard.valid]
    top = valid.new_full((len(valid), 1), -torch.inf, dtype=torch.float64)
    if shard.valid:
        top = valid.amax(-1, keepdim=True).double()
    mass = (valid.double() - shard.max(top)).exp_().cumsum(-1)
    own = mass[:, -1:].clone() if shard.valid else torch.zeros_like(top)
    ends = shard.gather(own).cumsum(-1)  # [N, ranks]
    rank = shard.start // shard.width
    before = ends[:, rank - 1 : rank] if rank else torch.zeros_like(own)
    return mass, before, ends[:, -1:]


def _last_possible(mass: Tensor) -> Tensor:
    """Return the last column with nonzero probability [N, 1]; no draw may be rounded past it."""
    return torch.searchsorted(mass, mass[:, -1:].contiguous(), right=False)


def _counted(ids: Tensor) -> TopK:
    """Count equal ids in ascending ids [N, draws]; return distinct ids by descending count."""
    rows, draws = ids.shape
    new = torch.ones_like(ids, dtype=torch.bool)
    new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    index = new.cumsum(-1) - 1  # [N, draws]: the draw's index among the row's distinct ids
    counts = torch.zeros_like(ids).scatter_add_(-1, index, torch.ones_like(ids))
    distinct = torch.full_like(ids, ABSENT_ID).scatter_(-1, index, ids)
    counts, order = counts.sort(dim=-1, descending=True, stable=True)
    logits = (counts.double() / draws).log().float()  # -inf for a count of 0
    return TopK(
        ids=distinct.gather(-1, order),
        logits=logits,
        logsumexp=logits.new_zeros(rows),
        draws=True,
    )


def uniforms(seed: int, row: int, count: int) -> Tensor:
    """Return random numbers [count] float64 in [0, 1) that depend only on seed, row and position.

    Draws therefore do not depend on batches, processes or device.
    """
    start = mixed(counter(seed * GOLDEN + row))
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    return torch.from_numpy(unit(start + steps))
