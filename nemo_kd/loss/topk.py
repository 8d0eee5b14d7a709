"""The teacher's K most probable tokens over a sharded vocabulary, the same for any sharding.

    logits, ids = the K largest z_v, largest first, ties to the lower id
    logsumexp_T = log Σ_v exp(z_v / T)

Ties are frequent in bf16, and `torch.topk` does not define their order. So value and id are packed
into one int64 key, which orders them totally.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_kd.errors import NemoKDError
from nemo_kd.loss import kernels, torch_kernels
from nemo_kd.loss.compiling import never_compiled
from nemo_kd.loss.rows import Rows, row_chunks
from nemo_kd.loss.shard import VocabShard
from nemo_kd.loss.torch_kernels import exponentials, finite_top
from nemo_kd.topk import ABSENT_ID, TopK

BLOCK = 32
"""Number of columns in a block of the first selection; 32 and 64 are fastest for K = 100."""
MAX_EXCESS = 0.01
"""How far above 1 a row's probabilities may add up: more than the rounding of stored values."""
_LOW = 0xFFFFFFFF


@never_compiled
def vocab_parallel_topk(
    logits: Tensor,
    k: int,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    temperatures: Sequence[float] = (1.0,),
) -> TopK:
    """The K largest logits of each row, their ids, and the log-sum-exp of the row.

    Layout: logits [*, Vp] are this rank's columns (bf16, fp16 or float32; float64 is rounded to
    float32), N = the product of `*`; the result is the same on every rank. `logsumexp` is [N] for
    one temperature, [N, T] for T of them, in their order, float32 in nats. Columns ≥ `vocab_size`
    are padding: never chosen, never counted. A logit of -inf gives an absent id. K may be larger
    than Vp. Collectives: one all-gather of K int64 per row and rank, one all-reduce of [N, T].

    Errors: NemoKDError for K outside 1 ... vocab_size, or a temperature that is not positive.
    """
    shard = VocabShard.of(logits.shape[-1], group, vocab_size)
    if not 1 <= k <= shard.size:
        raise NemoKDError(f"k is {k}: expected 1 to {shard.size}, the vocabulary's size.")
    if not temperatures or min(temperatures) <= 0:
        raise NemoKDError(f"temperatures are {list(temperatures)}: expected one or more, all > 0.")
    rows = Rows.of(logits)
    fused = kernels.choose(logits) is not torch_kernels and shard.valid > 0
    keys, sums = (_in_place if fused else _in_scratch)(rows, k, shard, temperatures)
    keys = _top(shard.gather(keys), k)  # [N, K] of [N, K · ranks]
    values, ids = _decode(keys)
    ids.masked_fill_(values == -torch.inf, ABSENT_ID)
    logsumexp = _add_ranks(sums, values[:, 0], temperatures, shard)
    return TopK(
        ids=ids,
        logits=values,
        logsumexp=logsumexp.squeeze(-1) if len(temperatures) == 1 else logsumexp,
        temperatures=tuple(map(float, temperatures)),
    )


@never_compiled
def check_teacher(teacher: TopK, vocab_size: int, may_be_absent: bool = False) -> None:
    """Refuse invalid teacher rows; meant for the data loader, on the CPU.

    Errors: NemoKDError that names the first row with an id outside [0, vocab_size), an id twice,
    no id at all (unless a token's teacher `may_be_absent`), an absent id with a logit, a logit or
    log-sum-exp that is NaN, or probabilities that add up to more than 1 (by `MAX_EXCESS`).
    """
    ids, logits, logsumexp = teacher.ids, teacher.logits, teacher.logsumexp
    if ids.shape[1] > vocab_size:
        raise NemoKDError(f"The teacher has K = {ids.shape[1]} of a vocabulary of {vocab_size}.")
    ordered = _sorted(ids)  # [N, K]
    again = ordered[:, 1:] == ordered[:, :-1]
    outside = (ordered[:, -1:] >= vocab_size).any(-1)
    if bool((ordered[:, :1] < 0).any()):  # absent ids, which most teachers do not have
        again &= ordered[:, 1:] >= 0
        outside |= ((ids < 0) & ((ids != ABSENT_ID) | (logits != -torch.inf))).any(-1)
        if not may_be_absent:
            outside |= (ordered[:, -1:] < 0).any(-1)
    repeated = again.any(-1)
    nan, excess = logits.isnan().any(-1), torch.zeros_like(outside)
    if logsumexp is not None:
        columns = logsumexp.unsqueeze(-1).flatten(1)  # [N, T]
        nan = nan | columns.isnan().any(-1)
        for column, temperature in zip(columns.unbind(-1), teacher.temperatures, strict=True):
            mass = (logits / temperature - column.unsqueeze(-1)).exp_().sum(-1)
            excess |= mass > 1 + MAX_EXCESS
    for bad, what in (
        (outside, f"an id outside [0, {vocab_size})"),
        (repeated, "the same id twice"),
        (nan, "a logit or log-sum-exp that is NaN"),
        (excess, "probabilities exp(logit / T - logsumexp) that add up to more than 1"),
    ):
        if bad.any():
            row = int(bad.nonzero()[0])
            raise NemoKDError(
                f"Teacher row {row} has {what} (ids {ids[row, :8].tolist()} ...). The teacher's "
                "data does not fit this student's vocabulary, or is damaged: verify the store."
            )


def _sorted(ids: Tensor) -> Tensor:
    """Sort each row in ascending order; on a CPU with numpy, which is seven times as fast."""
    if ids.device.type != "cpu" or find_spec("numpy") is None:
        return ids.sort(dim=-1).values
    ordered = ids.numpy().copy()
    ordered.sort(axis=-1)
    return torch.from_numpy(ordered)


def _encode(values: Tensor, ids: Tensor) -> Tensor:
    """int64 keys that order by value, then by the lower id. Two 32-bit words per value."""
    bits = (values + 0.0).view(torch.int32)  # -0.0 and 0.0 are one value
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers, in the order of the floats
    return (ordered.to(torch.int64) << 32) | (_LOW - ids)


def _decode(keys: Tensor) -> tuple[Tensor, Tensor]:
    """(float32 values, int64 ids) of `_encode`'s keys."""
    ordered = (keys >> 32).to(torch.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.view(torch.float32), _LOW - (keys & _LOW)


def _top(keys: Tensor, k: int) -> Tensor:
    return keys.topk(k, dim=-1).values


def _in_scratch(
    rows: Rows, k: int, shard: VocabShard, temperatures: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """The shard's keys [N, K] and log-sum-exps [N, T], from one float32 copy of each chunk."""
    device = rows.matrix.device
    keys = torch.empty(len(rows), k, dtype=torch.int64, device=device)
    sums = torch.empty(len(rows), len(temperatures), device=device)
    columns = -(-shard.width // BLOCK) * BLOCK
    scratch = None
    for part in row_chunks(len(rows), columns, device):
        if scratch is None:
            scratch = torch.full((part.stop, columns), -torch.inf, device=device)
        work = scratch[: part.stop - part.start]
        work[:, : shard.valid] = rows.read(part)[:, : shard.valid]
        keys[part] = _largest_keys(work, k, shard)
        sums[part] = _logsumexp(work, temperatures)
    return keys, sums


def _in_place(
    rows: Rows, k: int, shard: VocabShard, temperatures: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """As `_in_scratch`, without a copy: one read by `_largest_keys`, one by the loss's kernel."""
    device = rows.matrix.device
    keys = torch.empty(len(rows), k, dtype=torch.int64, device=device)
    for part in row_chunks(len(rows), shard.width, device):
        keys[part] = _largest_keys(rows.read(part)[:, : shard.valid], k, shard)
    nothing = torch.full((len(rows), 1), ABSENT_ID, device=device)  # to gather
    forward = kernels.choose(rows.matrix).forward
    sums = []
    for i in range(0, len(temperatures), 2):  # the kernel takes one or two
        pair = temperatures[i : i + 2]
        found = forward(rows, nothing, shard, pair)
        sums += [a + found.top / t for a, t in zip(found.log_sum, pair, strict=True)]
    return keys, torch.stack(sums, -1)


def _largest_keys(work: Tensor, k: int, shard: VocabShard) -> Tensor:
    """The shard's K largest keys [n, K] of work [n, columns]; padded with the smallest key.

    The K largest lie in the K blocks with the largest maxima (ties to the lower block, whose ids
    are lower), so only those are searched.
    """
    rows, columns = work.shape
    found = work.new_full((rows, k), torch.iinfo(torch.int64).min, dtype=torch.int64)
    ids = torch.arange(columns, device=work.device)
    if columns // BLOCK > k:
        maxima = _block_maxima(work)
        blocks = _encode(maxima.float(), ids[: maxima.shape[1]])
        block = _decode(_top(blocks, k))[1].unsqueeze(-1)  # [n, K, 1]
        ids = (block * BLOCK + ids[:BLOCK]).flatten(1)  # [n, K · BLOCK]
        beyond = ids >= columns if columns % BLOCK else None
        work = work.gather(1, ids if beyond is None else ids.clamp(max=columns - 1))
        if beyond is not None:
            work.masked_fill_(beyond, -torch.inf)
    here = min(k, shard.valid)
    found[:, :here] = _top(_encode(work.float(), ids + shard.start), here)
    return found


def _block_maxima(work: Tensor) -> Tensor:
    """Maxima [n, blocks] of work [n, columns]; the last block may be narrower."""
    blocks = work.shape[1] // BLOCK
    maxima = work[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK)).amax(-1)
    rest = work[:, blocks * BLOCK :]
    return torch.cat([maxima, rest.amax(-1, keepdim=True)], -1) if rest.shape[1] else maxima


def _logsumexp(work: Tensor, temperatures: Sequence[float]) -> Tensor:
    """log Σ exp(work / T) [n, temperatures]; -inf for a row of -inf."""
    top = work.amax(-1)
    shift = finite_top(work, top)
    sums = [exponentials(work, shift, t).sum(-1).log() + top / t for t in temperatures]
    work[:, 0].masked_fill_(top == -torch.inf, -torch.inf)
    return torch.stack(sums, -1)


def _add_ranks(
    sums: Tensor, top: Tensor, temperatures: Sequence[float], shard: VocabShard
) -> Tensor:
    """log Σ over the ranks of exp(sums) [N, T]; `top` [N]: the rows' maxima; -inf if all are."""
    if shard.group is None:
        return sums
    scale = top.unsqueeze(-1) / sums.new_tensor(list(temperatures))  # [N, T]
    total = scale + shard.sum((sums - scale).exp_()).log_()
    return total.where(scale != -torch.inf, scale)
