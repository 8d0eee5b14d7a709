"""The data iterator of a data-parallel rank: micro-batches of a data set, in order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core import parallel_state

from nemo_kd.errors import NemoKDError
from nemo_kd.mcore.dataset import Batch, KDDataset, Source
from nemo_kd.store import Store, StoreError


class KDBatches:
    """Endless iterator over the micro-batches of one data-parallel rank.

    The micro-batches of a step, over all ranks, are the next `global_batch_size` items of
    `dataset` on any number of ranks. `state_dict()`, called between two steps, and
    `load_state_dict()` continue the sequence exactly, on any layout.

    Errors: StoreError for a `global_batch_size` that the ranks cannot divide, or that is larger
    than the data set.
    """

    def __init__(
        self,
        dataset: KDDataset,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        consumed_samples: int = 0,
    ) -> None:
        self.dataset = dataset
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self.consumed_samples = consumed_samples
        self.ranks = parallel_state.get_data_parallel_world_size()
        if global_batch_size % (micro_batch_size * self.ranks):
            raise StoreError(
                f"global_batch_size={global_batch_size} is not a multiple of micro_batch_size × "
                f"data-parallel ranks = {micro_batch_size} × {self.ranks}"
            )
        if len(dataset) < global_batch_size:
            names = ", ".join(source.name for source in dataset.sources)
            kind = "packs" if dataset.packed else "samples"
            raise StoreError(
                f"store {names} has {len(dataset)} {kind}, fewer than "
                f"global_batch_size={global_batch_size}"
            )
        self._micro_batches = self._generate()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._micro_batches)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the sequence, and what determines the sequence."""
        return {"consumed_samples": self.consumed_samples, **self.dataset.identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the position of `state`.

        Errors: NemoKDError, naming each difference, if it was saved of another sequence of items.
        """
        own = self.dataset.identity
        changed = {name: state.get(name) for name in own if state.get(name) != own[name]}
        if changed:
            differences = [f"{name} was {old}, is {own[name]}" for name, old in changed.items()]
            raise NemoKDError(
                f"the saved position is one of other samples: {', '.join(differences)}; restore "
                "these settings, or start with a new iterator"
            )
        self.consumed_samples = int(state["consumed_samples"])
        self._micro_batches = self._generate()

    def _generate(self) -> Iterator[Batch]:
        rank = parallel_state.get_data_parallel_rank()
        while True:
            start = self.consumed_samples
            self.consumed_samples += self.global_batch_size
            mine = range(start + rank, self.consumed_samples, self.ranks)
            for first in range(0, len(mine), self.micro_batch_size):
                draws = mine[first : first + self.micro_batch_size]
                yield _pinned(self.dataset.collate_fn([self.dataset[draw] for draw in draws]))


class StoreBatches(KDBatches):
    """`KDBatches` over the samples of a store, or of several sources: see `KDDataset`."""

    def __init__(
        self,
        store: Store | Sequence[Source],
        *,
        seq_length: int,
        micro_batch_size: int,
        global_batch_size: int,
        temperature: float = 1.0,
        seed: int = 0,
        consumed_samples: int = 0,
        over_long: str = "error",
        packed: bool = False,
        shuffle: bool = True,
    ) -> None:
        super().__init__(
            KDDataset(
                store,
                seq_length=seq_length,
                temperature=temperature,
                seed=seed,
                over_long=over_long,
                packed=packed,
                shuffle=shuffle,
            ),
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            consumed_samples=consumed_samples,
        )


def _pinned(batch: Batch) -> Batch:
    """Move the batch to pinned memory, from which a copy to the GPU does not block the host."""
    if not torch.cuda.is_available():
        return batch
    return {
        name: value.pin_memory() if hasattr(value, "pin_memory") else value
        for name, value in batch.items()
    }
