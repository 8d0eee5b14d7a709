"""Stores and SFT files as one endless data set of Megatron-core micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from nemo_kd.data import (
    answer_tokens,
    check_schedule,
    collate_packs,
    fit_lengths,
    joined,
    no_teacher,
    pack_samples,
    teacher_of,
    truncate_prompt,
)
from nemo_kd.errors import NemoKDError
from nemo_kd.loss import KDConfig
from nemo_kd.mcore.blend import EndlessBlend
from nemo_kd.mcore.context import own_positions
from nemo_kd.sft.rows import SFTRows
from nemo_kd.store import Store
from nemo_kd.store.sample import Tokens
from nemo_kd.topk import TopK

Batch = dict[str, Any]
"""A micro-batch on the CPU: `tokens`, `labels`, `loss_mask` and `position_ids` [B, S / C], and
`answers`, an `AnswerTokens`; with packs also `cu_seqlens` [sequences + 1] int32 and `max_seqlen`,
an int."""

PAD_ID = 0


@dataclass(frozen=True)
class Source:
    """A store, or the rows of an SFT file without a teacher, in a mix."""

    data: Store | SFTRows
    """SFT rows, opened by `nemo_kd.sft.reader.open_rows` with the stores' tokenizer and template,
    are trained with cross-entropy only."""

    alpha: float | None = None
    """Weight of the distillation for the samples of this store; None: that of the training."""

    weight: float | None = None
    """Share of the draws, relative to the other sources; None in all: their numbers of samples."""

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise NemoKDError(f"alpha={self.alpha} of {self.name}: expected a value in [0, 1]")
        if self.alpha and isinstance(self.data, SFTRows):
            raise NemoKDError(
                f"alpha={self.alpha} of {self.name}: a file without a teacher has nothing to "
                "distil; leave out alpha, or dump the file"
            )
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise NemoKDError(f"weight={self.weight} of {self.name}: expected a value above 0")

    @property
    def name(self) -> str:
        """The store or the file, for messages."""
        return str(self.data.origin if isinstance(self.data, Store) else self.data.file.path)


class Item(NamedTuple):
    """A sample, or a pack of samples, with the teacher's rows."""

    parts: list[Tokens]
    teacher: TopK
    alpha: float | None


class KDDataset(torch.utils.data.Dataset[Item]):
    """Endless data set over the samples of stores and SFT files, or over packs of samples.

    `dataset[draw]` is the item at a position of the sequence of all epochs, and `len(dataset)` the
    number of items in one epoch. Every epoch of a source contains each of its items once. The
    sequence depends on `seed` and the sources only, so a resumed run continues it on any layout.

    `seq_length` is the number of inputs: of a sample of at most `seq_length + 1` tokens, or of a
    pack. `packed` needs micro-batches of one pack, and no context parallelism.

    Errors: StoreError for samples that are too long (see `over_long` of `fit_lengths`), for a
    temperature that was not dumped, and for stores of different tokenizers; NemoKDError for weights
    of only some sources, and for packs of SFT rows.
    """

    def __init__(
        self,
        sources: Sequence[Source] | Store,
        *,
        seq_length: int,
        temperature: float = 1.0,
        seed: int = 0,
        over_long: str = "error",
        packed: bool = False,
        shuffle: bool = True,
    ) -> None:
        self.sources = [Source(sources)] if isinstance(sources, Store) else list(sources)
        self.seq_length, self.temperature = seq_length, temperature
        self.seed, self.over_long, self.packed, self.shuffle = seed, over_long, packed, shuffle
        self._check()
        self._readers = [self._reader(source) for source in self.sources]
        sizes = [len(reader) for reader in self._readers]
        given = [source.weight for source in self.sources if source.weight is not None]
        self._blend = EndlessBlend(given or sizes)
        self._size = sum(sizes)
        # Two entries per source, since a batch may extend into the next epoch.
        self._order_of = lru_cache(maxsize=2 * len(sizes))(self._order)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, draw: int) -> Item:
        which, number = self._blend[draw]
        epoch, position = divmod(number, len(self._readers[which]))
        return self._readers[which][int(self._order_of(which, epoch)[position])]

    @cached_property
    def own_positions(self) -> torch.Tensor | None:
        """This context-parallel rank's positions, for process groups that start after the check."""
        return own_positions(self.seq_length)

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the sequence of items, for comparison when a run is resumed."""
        return {
            "sources": [_fingerprint(source) for source in self.sources],
            "weights": list(map(float, self._blend.weights)),
            "items": [len(reader) for reader in self._readers],
            "seq_length": self.seq_length,
            "seed": self.seed,
            "packed": self.packed,
            "shuffle": self.shuffle,
        }

    def check(self, config: KDConfig, *, training: bool = True) -> None:
        """Refuse stores from which the loss of `config` learns nothing, or only with a bias.

        Errors: StoreError, as `nemo_kd.data.check_schedule`.
        """
        for source in self.sources:
            if isinstance(source.data, Store):
                check_schedule(source.data, config, source.alpha, training=training)

    def collate_fn(self, items: Sequence[Item]) -> Batch:
        """Collate the items of a micro-batch, this context-parallel rank's part of it."""
        batch = self._packs(items) if self.packed else self._padded(items)
        own = self.own_positions
        answers = answer_tokens(
            batch["loss_mask"],
            [item.teacher for item in items],
            [item.alpha for item in items],
            own,
        )
        mine = {name: x if own is None else x[:, own] for name, x in batch.items()}
        return {**mine, "answers": answers}

    def _padded(self, items: Sequence[Item]) -> Batch:
        shape = len(items), self.seq_length
        batch = {name: torch.full(shape, PAD_ID) for name in ("tokens", "labels")}
        batch["loss_mask"] = torch.zeros(shape)
        batch["position_ids"] = torch.arange(self.seq_length).expand(shape)
        for b, item in enumerate(items):
            (sample,) = item.parts
            ids = torch.from_numpy(sample.input_ids.astype(np.int64))
            batch["tokens"][b, : len(ids) - 1] = ids[:-1]
            batch["labels"][b, : len(ids) - 1] = ids[1:]
            batch["loss_mask"][b, : len(ids) - 1] = torch.from_numpy(sample.loss_mask[1:].copy())
        return batch

    def _packs(self, items: Sequence[Item]) -> Batch:
        if len(items) != 1:
            raise NemoKDError(
                f"micro_batch_size={len(items)} with packed sequences: a pack is a micro-batch of "
                "its own; set micro_batch_size=1, and seq_length to the number of tokens of a pack"
            )
        parts = [(part.input_ids.tolist(), part.loss_mask.tolist()) for part in items[0].parts]
        found = collate_packs([parts], self.seq_length, PAD_ID)
        ends = found["cu_seqlens"][0, : int(found["cu_seqlens_argmin"])]
        return {
            **{name: found[name] for name in ("tokens", "labels", "position_ids")},
            "loss_mask": found["loss_mask"].float(),
            "cu_seqlens": ends,
            "max_seqlen": int(ends.diff().max()),
        }

    def _check(self) -> None:
        stores = [source.data for source in self.sources if isinstance(source.data, Store)]
        if not self.sources:
            raise NemoKDError("no store and no file to train on: give at least one Source")
        for store in stores:
            store.check(
                temperature=self.temperature,
                tokenizer_fingerprint=stores[0].spec.tokenizer.get("fingerprint"),
                vocab_size=stores[0].spec.vocab_size,
            )
        weights = [source.weight for source in self.sources]
        if None in weights and any(weight is not None for weight in weights):
            raise NemoKDError(f"weights of the sources are {weights}: give all or none of them")
        if self.packed and own_positions(self.seq_length) is not None:
            raise NemoKDError(
                "packed sequences with context parallelism are not supported: set packed=False, or "
                "context_parallel_size=1"
            )

    def _reader(self, source: Source) -> _Samples | _Packed | _Rows:
        if isinstance(source.data, SFTRows):
            if self.packed:
                raise NemoKDError(
                    f"{source.name}: packed sequences of a file without a teacher are not "
                    "supported: dump it too, or set packed=False"
                )
            return _Rows(source.data, self.seq_length, self.temperature)
        samples = _Samples(source.data, source.alpha, self)
        return _Packed(samples, self) if self.packed else samples

    def _order(self, which: int, epoch: int) -> NDArray[np.int64]:
        """Return the items of a source in the order of an epoch."""
        size = len(self._readers[which])
        if not self.shuffle:
            return np.arange(size)
        return np.random.default_rng([self.seed, epoch, *([which] if which else [])]).permutation(
            size
        )


class _Samples:
    """The samples of a store that fit."""

    def __init__(self, store: Store, alpha: float | None, dataset: KDDataset) -> None:
        self.store, self.alpha = store, alpha
        self.length, self.temperature = dataset.seq_length + 1, dataset.temperature
        self.fitting = fit_lengths(store, self.length, dataset.over_long)

    def __len__(self) -> int:
        return len(self.fitting.used)

    def __getitem__(self, index: int) -> Item:
        stored = self.store[int(self.fitting.used[index])]
        sample = truncate_prompt(stored, self.length)
        return Item([sample], teacher_of(sample, self.temperature), self.alpha)


class _Packed:
    """Packs of the samples of a store."""

    def __init__(self, samples: _Samples, dataset: KDDataset) -> None:
        self.samples = samples
        seed = dataset.seed if dataset.shuffle else None
        self.packs = pack_samples(samples.store, samples.fitting, dataset.seq_length, seed).packs

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> Item:
        items = [self.samples[int(i)] for i in self.packs[index]]
        parts = [part for item in items for part in item.parts]
        return Item(parts, joined([item.teacher for item in items]), self.samples.alpha)


class _Rows:
    """The rows of an SFT file, without a teacher."""

    def __init__(self, rows: SFTRows, seq_length: int, temperature: float) -> None:
        if rows.max_seq_length > seq_length + 1:
            raise NemoKDError(
                f"{rows.file.path} is read with max_seq_length={rows.max_seq_length}, more than "
                f"seq_length + 1 = {seq_length + 1}: open its rows with that max_seq_length"
            )
        self.rows, self.temperature = rows, temperature

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        row = self.rows[index]
        return Item([row], no_teacher(row.answers, self.temperature), 0.0)


def _fingerprint(source: Source) -> str:
    data = source.data
    return data.fingerprint if isinstance(data, Store) else data.file.sha256
