"""Sums over all ranks of a job that any rank adds to and reads at any moment, without collectives.

They are kept in the key-value store through which the processes found one another, whose `add` is
atomic. So no rank waits for one that has more to do or has died.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.distributed.distributed_c10d import Store


class JobCounters:
    """Integers by name in a store that nothing else uses."""

    def __init__(self, store: Store, names: Sequence[str]) -> None:
        self.store = store
        self.names = tuple(names)

    def add(self, **amounts: int) -> None:
        for name, amount in amounts.items():
            self.store.add(name, amount)

    def read(self) -> dict[str, int]:
        return {name: self.store.add(name, 0) for name in self.names}
