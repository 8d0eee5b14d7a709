"""The data iterator of a data-parallel rank: micro-batches of a data set, in order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from megatron.core import parallel_state

from nemo_kd.errors import NemoKDError
from nemo_kd.mcore.dataset import Batch, Item, KDDataset, check_integers
from nemo_kd.mcore.device import pinned
from nemo_kd.mcore.mix import Sources, changed
from nemo_kd.store import StoreError


class KDBatches:
    """Endless iterator over the micro-batches of one data-parallel rank.

    The micro-batches of a step, over all ranks, are the next `global_batch_size` items of
    `dataset` on any number of ranks. `state_dict()` and `load_state_dict()` continue the sequence
    exactly, on any layout; within a step, at its start.

    Errors: StoreError for a `global_batch_size` that the ranks cannot divide, or that is larger
    than the data set; NemoKDError for sizes that are not positive integers.
    """

    def __init__(
        self,
        dataset: KDDataset,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        consumed_samples: int = 0,
    ) -> None:
        check_integers(1, micro_batch_size=micro_batch_size, global_batch_size=global_batch_size)
        check_integers(0, consumed_samples=consumed_samples)
        self.dataset = dataset
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self.consumed_samples = consumed_samples
        self.ranks = parallel_state.get_data_parallel_world_size()
        if global_batch_size % (micro_batch_size * self.ranks):
            raise StoreError(
                f"global_batch_size={global_batch_size} is not a multiple of micro_batch_size × "
                f"data-parallel ranks = {micro_batch_size} × {self.ranks}"
            )
        self._check_size()
        dataset.place()
        self._drawn = 0  # items of this rank in the current step

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        first = self.consumed_samples + parallel_state.get_data_parallel_rank()
        after = self.consumed_samples + self.global_batch_size
        mine = range(first, after, self.ranks)[self._drawn :][: self.micro_batch_size]
        batch = self.dataset.collate_fn([self._item(draw) for draw in mine])
        self._drawn += self.micro_batch_size
        if self._drawn * self.ranks == self.global_batch_size:
            self.consumed_samples, self._drawn = after, 0
        return {name: pinned(value) for name, value in batch.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the sequence, the start of a step, and what determines it."""
        return {"consumed_samples": self.consumed_samples, **self.dataset.identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the position of `state`.

        Errors: NemoKDError, naming each difference, if it was saved of another sequence of items.
        """
        own = self.dataset.identity
        differences = [
            f"{name} was {state.get(name)}, is {own[name]}" for name in changed(state, own)
        ]
        if differences:
            raise NemoKDError(
                f"the saved position is one of other samples: {', '.join(differences)}; restore "
                "these settings, or start with a new iterator"
            )
        consumed = state.get("consumed_samples")
        check_integers(0, consumed_samples=consumed)
        self.consumed_samples, self._drawn = int(cast(int, consumed)), 0

    def _item(self, draw: int) -> Item:
        return self.dataset[draw]

    def _check_size(self) -> None:
        if len(self.dataset) < self.global_batch_size:
            names = ", ".join(source.name for source in self.dataset.sources)
            kind = "packs" if self.dataset.packed else "samples"
            raise StoreError(
                f"store {names} has {len(self.dataset)} {kind}, fewer than "
                f"global_batch_size={self.global_batch_size}"
            )


class EvaluationBatches(KDBatches):
    """Evaluations of `steps` global batches each, that contain every item of the data set once.

    Each evaluation starts at the first item. The last batch is filled with items that have no
    answer token, which add nothing to any sum. With `steps`, evaluations have this number of
    batches: without the last items if it is too small for all. `sizes`: the arguments of
    `KDBatches`.
    """

    def __init__(
        self,
        dataset: KDDataset,
        *,
        steps: int | None = None,
        **sizes: int,
    ) -> None:
        super().__init__(dataset, **sizes)
        self.steps = -(-len(dataset) // self.global_batch_size) if steps is None else steps
        """The number of global batches of an evaluation."""
        check_integers(1, steps=self.steps)

    def _item(self, draw: int) -> Item:
        return self.dataset.evaluated(draw, self.steps * self.global_batch_size)

    def _check_size(self) -> None:
        """Accept any size."""


class StoreBatches(KDBatches):
    """`KDBatches` over the samples of a store, or of several sources.

    `dataset`: the arguments of `KDDataset`, of which `seq_length` is required.
    """

    def __init__(
        self,
        store: Sources,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        consumed_samples: int = 0,
        **dataset: Any,
    ) -> None:
        super().__init__(
            KDDataset(store, **dataset),
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            consumed_samples=consumed_samples,
        )
