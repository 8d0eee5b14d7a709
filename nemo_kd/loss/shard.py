"""The columns of the vocabulary that a rank holds: Megatron's equal, contiguous parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_kd.errors import NemoKDError


@dataclass(frozen=True)
class VocabShard:
    """Columns `start + [0, width)` of a vocabulary of `size`; the first `valid` of them are real.

    Megatron pads the vocabulary at its end, so the last ranks may hold few real columns or none.
    """

    start: int
    width: int
    valid: int
    size: int
    group: dist.ProcessGroup | None
    """None where the vocabulary is not sharded (or the group has one rank)."""

    @classmethod
    def of(
        cls, width: int, group: dist.ProcessGroup | None = None, vocab_size: int | None = None
    ) -> VocabShard:
        """The shard of `width` columns on this rank of `group`; no collective.

        Errors: NemoKDError for a `vocab_size` that the shards cannot hold.
        """
        ranks = 1 if group is None else dist.get_world_size(group)
        rank = 0 if group is None else dist.get_rank(group)
        size = width * ranks if vocab_size is None else vocab_size
        if not 1 <= size <= width * ranks:
            raise NemoKDError(
                f"vocab_size is {vocab_size}, but the logits have {width} columns on each of "
                f"{ranks} rank(s): expected 1 to {width * ranks}. Pass the tokenizer's vocabulary "
                "size and the group over which the logits are sharded."
            )
        valid = min(max(size - rank * width, 0), width)
        return cls(rank * width, width, valid, size, group if ranks > 1 else None)

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(column of each id, 0 outside this shard; whether the id is in this shard)."""
        column = ids - self.start
        here = (column >= 0) & (column < self.valid)
        return column.masked_fill_(~here, 0), here

    def sum(self, values: Tensor) -> Tensor:
        """values ← Σ over the ranks, in place. One all-reduce, none if unsharded or empty.

        The number of rows is the same on every rank, so an empty one is skipped by all of them.
        """
        return self._all_reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Tensor) -> Tensor:
        """values ← maximum over the ranks, in place. One all-reduce, like `sum`."""
        return self._all_reduce(values, dist.ReduceOp.MAX)

    def gather(self, values: Tensor) -> Tensor:
        """[N, J] on each rank → [N, J · ranks], in the order of the ranks. One all-gather."""
        if self.group is None or values.numel() == 0:
            return values
        parts = [torch.empty_like(values) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, values, group=self.group)
        return torch.cat(parts, dim=-1)

    def _all_reduce(self, values: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        if self.group is not None and values.numel():
            dist.all_reduce(values, op=op, group=self.group)
        return values
