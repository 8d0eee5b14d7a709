"""Job-wide counters that any rank can increment or read at any time, without collectives.

They live in torch.distributed's rendezvous key-value store, whose `add` is atomic. No rank
therefore waits for one that has more work or has died.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.distributed.distributed_c10d import Store


class JobCounters:
    """Named integer counters in a key-value store that nothing else uses."""

    def __init__(self, store: Store, names: Sequence[str]) -> None:
        self.store = store
        self.names = tuple(names)

    def add(self, **amounts: int) -> None:
        for name, amount in amounts.items():
            self.store.add(name, amount)

    def read(self) -> dict[str, int]:
        return {name: self.store.add(name, 0) for name in self.names}
