"""Random draws from the teacher's whole distribution over a sharded vocabulary.

    p_hat(v) = count_v / draws,   E[p_hat(v)] = p(v),   Σ_v count_v = draws

After *Sparse Logit Sampling* (Anshumann et al. 2025, arXiv 2503.16870), which draws independently.
Here the draws of a token are evenly spaced from one random number u: with P the cumulative
probability, draw j is the v in which `(j + u) / draws` falls, `P(v - 1) <= (j + u) / draws < P(v)`.
A count is then within 1 of `draws * p(v)`: as unbiased, and for no token of larger variance.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_kd.loss.shard import VocabShard
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
    """The ids that `draws` draws of each row give, and how often, as the `sampled` profile has it.

    Layout: logits [N, Vp] are this rank's columns, columns ≥ `vocab_size` are padding and never
    drawn; uniform [N] float64 in [0, 1) is the same on every rank, and so is the result: ids
    [N, draws] int64 by falling count (ties to the lower id), then -1; logits `log(count / draws)`
    float32, then -inf; logsumexp [N] zeros. Of a row with NaN or +inf, or with nothing above -inf,
    nothing can be drawn: its logits are NaN. On another sharding the same but for rounding of the
    float64 sums. Memory: 8 bytes a logit. Collectives: an all-reduce and an all-gather of [N], an
    all-reduce of [N, draws].

    Errors: ValueError for draws below 1, or a `uniform` of another shape.
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
    # Rounding may put the last point on the end itself.
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
    """(cumulative Σ exp(z - max) [N, valid] of this shard, Σ of the shards before it [N, 1],
    Σ of all [N, 1]), float64; the last two are the same numbers on every rank."""
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
    """[N, 1]: the last column of any probability; rounding must not draw one of none."""
    return torch.searchsorted(mass, mass[:, -1:].contiguous(), right=False)


def _counted(ids: Tensor) -> TopK:
    """Rising ids [N, draws], one a draw → the different ones by falling count."""
    rows, draws = ids.shape
    new = torch.ones_like(ids, dtype=torch.bool)
    new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    place = new.cumsum(-1) - 1  # [N, draws]: which of the row's different ids a draw is
    counts = torch.zeros_like(ids).scatter_add_(-1, place, torch.ones_like(ids))
    distinct = torch.full_like(ids, ABSENT_ID).scatter_(-1, place, ids)
    counts, order = counts.sort(dim=-1, descending=True, stable=True)
    logits = (counts.double() / draws).log().float()  # -inf where nothing was drawn
    return TopK(
        ids=distinct.gather(-1, order),
        logits=logits,
        logsumexp=logits.new_zeros(rows),
        draws=True,
    )


def uniforms(seed: int, row: int, count: int) -> Tensor:
    """[count] float64 in [0, 1): a function of (seed, row, place) alone, on any machine.

    53 high bits of splitmix64 (Steele et al. 2014), begun at a hash of seed and row: a dump's
    draws do not depend on its batches, processes or device.
    """
    start = _mixed(torch.tensor(_signed(seed * _GOLDEN + row)))
    places = torch.arange(1, count + 1, dtype=torch.int64) * _signed(_GOLDEN)
    return _shifted(_mixed(start + places), 11).double() / (1 << 53)


_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio


def _mixed(x: Tensor) -> Tensor:
    """splitmix64's output function; int64 stands for uint64, products wrap."""
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: int64's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    value %= 1 << 64
    return value - (1 << 64) if value >> 63 else value
