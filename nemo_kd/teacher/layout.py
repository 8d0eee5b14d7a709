"""Position of this process among the processes of a job, and small collectives over them.

The teacher's framework package creates the `Layout`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from nemo_kd.errors import NemoKDError
from nemo_kd.visible import visible

CPU = torch.device("cpu")
Value = TypeVar("Value")


class LayoutError(NemoKDError):
    """Incompatible numbers of processes, parallel sizes or precision."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Distribution of the teacher over a job's processes ("ranks"), as seen from one rank.

    The job holds `replicas` copies of the teacher, each split across one or more ranks. The
    defaults describe a single process, which needs no process group.
    """

    rank: int = 0
    size: int = 1
    """Number of ranks of the job."""

    replica: int = 0
    """Index of the copy of the teacher that this rank holds a part of (data-parallel rank)."""

    replicas: int = 1
    writes: bool = True
    """Whether this rank has the logits and writes shards; true for one rank per replica."""

    stages: int = 1
    """Number of pipeline stages of a replica."""

    tensor_group: dist.ProcessGroup | None = None
    """The ranks that the vocabulary is split across; None if this rank holds all of it."""

    replica_group: dist.ProcessGroup | None = None
    """The ranks of this replica; None for a replica on a single rank."""

    device: torch.device = CPU
    """Device of the model's inputs and of the tensors passed to collectives."""

    @classmethod
    def of_job(cls) -> Layout:
        """Return the rank and size of the default process group, as a single replica.

        Without a process group, returns the layout of a single process.
        """
        if not dist.is_initialized():
            return cls()
        return cls(rank=dist.get_rank(), size=dist.get_world_size())

    def share(self, items: Sequence[Value]) -> Sequence[Value]:
        """Return this rank's share of its replica's items."""
        if self.replica_group is None:
            return items
        return items[dist.get_rank(self.replica_group) :: dist.get_world_size(self.replica_group)]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def gather(self, value: Value) -> list[Value]:
        """All-gather a picklable value; return the values in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_rank_0(self, value: Value) -> Value:
        """Broadcast rank 0's value to every rank."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def sum(self, counts: Sequence[int]) -> list[int]:
        """All-reduce int64 counts; return the sums over all ranks, on every rank."""
        if self.size == 1:
            return list(counts)
        sums = torch.tensor(counts, dtype=torch.int64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank; collective over all ranks."""
        return self._any(flag, None) if self.size > 1 else flag

    def any_in_replica(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank of this replica; collective over them."""
        return flag if self.replica_group is None else self._any(flag, self.replica_group)

    def _any(self, flag: bool, group: dist.ProcessGroup | None) -> bool:
        tensor = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
        return bool(tensor.item())

    def store(self, key: str) -> Store:
        """Return a key-value store shared by all ranks, with the namespace `key`."""
        return PrefixStore(key, _get_default_store() if self.size > 1 else dist.HashStore())  # type: ignore[attr-defined]

    def say(self, text: str) -> None:
        """Print a line to stderr, on rank 0 only."""
        self.say_each([text])

    def say_each(self, lines: Iterable[str]) -> None:
        """Print lines to stderr, on rank 0 only; the other ranks do not iterate over them."""
        for line in lines if not self.rank else ():
            print(visible(line), file=sys.stderr, flush=True)
