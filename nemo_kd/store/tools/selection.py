"""Copy samples of stores to a new store, in one process or several.

The new store is written shard by shard, as a dump writes it; each process reads and writes whole
shards. The result depends neither on the number of processes nor on the size of a shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nemo_kd.store.manifest import Manifest
from nemo_kd.store.parts import check_hashes
from nemo_kd.store.reader import Store
from nemo_kd.store.spec import ROWS_PER_SHARD, StoreSpec
from nemo_kd.store.tools.parallel import ordered, processes
from nemo_kd.store.writer import ShardWriter, StoreWriter

Progress = Callable[[int], None]
"""Callback that receives the number of samples written so far."""
ENCODING = ("profile", "profile_options", "top_k", "vocab_size", "temperatures")
"""Fields of the spec that determine how a sample is encoded."""
SHARDS = 16
"""Shards that one process writes at a time."""


@dataclass(frozen=True)
class Selection:
    """Samples of stores, in the order of their rows in the new store."""

    stores: tuple[Store, ...]
    store: NDArray[np.int64]
    """Index in `stores` of each sample's store [samples]."""
    index: NDArray[np.int64]
    """Index of each sample in its store [samples]."""
    row: NDArray[np.int64]
    """Its row in the new store [samples], ascending."""

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, samples: slice) -> Selection:
        return replace(
            self, store=self.store[samples], index=self.index[samples], row=self.row[samples]
        )

    @classmethod
    def of(cls, store: Store, chosen: NDArray[np.bool_] | None = None) -> Selection:
        """Select all samples of a store, or those that are chosen [samples]; rows stay."""
        rows = store.rows  # checks the size of the index before memory is taken for so many samples
        index = np.arange(len(rows)) if chosen is None else np.flatnonzero(chosen)
        return cls((store,), np.zeros(len(index), np.int64), index, rows[index])

    @classmethod
    def concatenated(cls, stores: list[Store], offsets: list[int]) -> Selection:
        """Select all samples of all stores; their rows are shifted by the stores' offsets."""
        sizes = [len(store.rows) for store in stores]
        rows = [store.rows + offset for store, offset in zip(stores, offsets, strict=True)]
        return cls(
            tuple(stores),
            np.repeat(np.arange(len(stores)), sizes),
            np.concatenate([np.arange(size) for size in sizes]),
            np.concatenate(rows),
        )

    @property
    def octets(self) -> int:
        """Approximate bytes of the selected samples."""
        total = sum(store.manifest.totals["bytes"] for store in self.stores)
        return total * len(self) // max(sum(map(len, self.stores)), 1)


@dataclass(frozen=True)
class _Task:
    """Some shards to write."""

    directory: Path
    spec: StoreSpec
    selection: Selection
    shards: range


def copy(
    selection: Selection,
    directory: Path,
    spec: StoreSpec,
    *,
    segment_bytes: int | None = None,
    progress: Progress | None = None,
    jobs: int = 1,
) -> Manifest:
    """Write the selected samples to the empty `directory`; returns the new store's manifest.

    A sample whose store has the same encoding is copied bit for bit, another one is encoded again,
    with the first K ids. The caller has checked the stores (`check_intact`). `jobs`: number of
    processes, 0 for one per core if there is much to copy.
    """
    rows = int(selection.row[-1]) + 1 if len(selection) else 0
    # Shards have 256 samples each on average: rows may be far sparser than samples.
    shards = max(1, len(selection) // ROWS_PER_SHARD)
    spec = replace(spec, rows_per_shard=max(ROWS_PER_SHARD, -(-rows // shards)))
    count = -(-rows // spec.rows_per_shard)
    writer, done = StoreWriter(directory, spec), 0
    jobs = processes(jobs, selection.octets)
    for written in ordered(_write, _tasks(selection, directory, spec, count), jobs):
        done += written
        if progress is not None:
            progress(done)
    writer.begin_joining(count, segment_bytes)
    writer.join()
    return writer.publish()


def check_intact(store: Store, jobs: int = 1) -> None:
    """Raise StoreError unless every file of a store has its SHA-256; damage is not copied."""
    store.check_index()
    tasks = ((store, number) for number in range(len(store.manifest.parts)))
    for _ in ordered(_check_part, tasks, processes(jobs, store.manifest.totals["bytes"])):
        pass


def _check_part(task: tuple[Store, int]) -> None:
    store, number = task
    check_hashes(store.part(number).directory, store.manifest.parts[number])


def _tasks(selection: Selection, directory: Path, spec: StoreSpec, count: int) -> Iterator[_Task]:
    for first in range(0, count, SHARDS):
        shards = range(first, min(first + SHARDS, count))
        limits = [shards.start * spec.rows_per_shard, shards.stop * spec.rows_per_shard]
        start, stop = np.searchsorted(selection.row, limits)
        yield _Task(directory, spec, selection[start:stop], shards)


def _write(task: _Task) -> int:
    """Write shards; returns the number of samples."""
    writer, chosen = StoreWriter(task.directory, task.spec), task.selection
    size = task.spec.rows_per_shard
    for number in task.shards:
        limits = [number * size, (number + 1) * size]
        start, stop = np.searchsorted(chosen.row, limits)
        with writer.shard(number) as out:
            for store, index, row in zip(
                chosen.store[start:stop].tolist(),
                chosen.index[start:stop].tolist(),
                chosen.row[start:stop].tolist(),
                strict=True,
            ):
                _copy(out, chosen.stores[store], index, row)
    return len(chosen)


def same_encoding(one: StoreSpec, other: StoreSpec) -> bool:
    """Return whether two stores encode the same sample as the same bytes."""
    return all(getattr(one, name) == getattr(other, name) for name in ENCODING)


def _copy(out: ShardWriter, store: Store, index: int, row: int) -> None:
    theirs, ours = store.spec, out.spec
    if same_encoding(theirs, ours):
        tokens, arrays = store.encoded(index)
        out.add_encoded(replace(tokens, row=row), arrays)
        return
    sample = store[index]
    topk, k = sample.topk, ours.top_k
    cut = replace(topk, ids=topk.ids[:, :k], logits=topk.logits[:, :k])
    out.add(replace(sample, row=row, topk=cut))
