"""Sums over all ranks of a job that any rank adds to and reads at any moment: no collective.

They live in the key-value store through which the processes found one another, whose `add` is
atomic. A rank that has more to do than another, or has died, keeps nobody waiting.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.distributed.distributed_c10d import PrefixStore, _get_default_store


class JobCounters:
    """Whole numbers by name; `key` is of this set of counters alone, the same on every rank."""

    def __init__(self, key: str, names: Sequence[str]) -> None:
        self.store = PrefixStore(key, _get_default_store())
        self.names = tuple(names)

    def add(self, **amounts: int) -> None:
        for name, amount in amounts.items():
            self.store.add(name, amount)

    def read(self) -> dict[str, int]:
        return {name: self.store.add(name, 0) for name in self.names}
