"""This process among those of a dump, as the room of the teacher's framework describes it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from nemo_kd.errors import NemoKDError

CPU = torch.device("cpu")
Value = TypeVar("Value")


class LayoutError(NemoKDError):
    """Processes, parallel sizes or a precision that do not work together."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A job's processes ("ranks") hold `replicas` copies of the teacher, each over a few ranks.

    By default a single process, which needs no process group.
    """

    rank: int = 0
    size: int = 1
    """Ranks of the job."""

    replica: int = 0
    """Which copy of the teacher this rank holds a part of: its data-parallel rank."""

    replicas: int = 1
    writes: bool = True
    """Whether this rank has the logits and writes shards; one rank of each replica does."""

    stages: int = 1
    """Pipeline stages of a replica."""

    tensor_group: dist.ProcessGroup | None = None
    """The ranks that share a vocabulary; None for a rank that has all of it."""

    replica_group: dist.ProcessGroup | None = None
    """The ranks of this replica; None for a replica on a single rank."""

    device: torch.device = CPU
    """Where tensors of collectives, and a model's inputs, are."""

    @classmethod
    def of_job(cls) -> Layout:
        """Rank and size of the default process group, without replicas; else a single process."""
        if not dist.is_initialized():
            return cls()
        return cls(rank=dist.get_rank(), size=dist.get_world_size())

    def share(self, items: Sequence[Value]) -> Sequence[Value]:
        """This rank's part of the items of its replica."""
        if self.replica_group is None:
            return items
        return items[dist.get_rank(self.replica_group) :: dist.get_world_size(self.replica_group)]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def gather(self, value: Value) -> list[Value]:
        """The values of all ranks, on every rank, in the order of the ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_rank_0(self, value: Value) -> Value:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def sum(self, counts: Sequence[int]) -> list[int]:
        """The sums over all ranks, on every rank."""
        if self.size == 1:
            return list(counts)
        sums = torch.tensor(counts, dtype=torch.int64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; all ranks call it."""
        return self._any(flag, None) if self.size > 1 else flag

    def any_in_replica(self, flag: bool) -> bool:
        """Whether the flag is set on any rank of this replica, all of whose ranks call it."""
        return flag if self.replica_group is None else self._any(flag, self.replica_group)

    def _any(self, flag: bool, group: dist.ProcessGroup | None) -> bool:
        tensor = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
        return bool(tensor.item())

    def store(self, key: str) -> Store:
        """Keys and values that all ranks see at any moment, apart from those of other `key`s."""
        return PrefixStore(key, _get_default_store() if self.size > 1 else dist.HashStore())  # type: ignore[attr-defined]

    def say(self, text: str) -> None:
        """Print a line on standard error, on rank 0 only."""
        if not self.rank:
            print(text, file=sys.stderr, flush=True)
