"""Stores and SFT files as one endless data set of Megatron-core micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from nemo_kd.data import (
    AnswerTokens,
    LengthLimit,
    StoreFacts,
    answer_tokens,
    collate_packs,
    fit_lengths,
    joined,
    no_teacher,
    notices,
    pack_samples,
    teacher_of,
    truncate_prompt,
)
from nemo_kd.data.learnable import FIELD, Naming, check_stores
from nemo_kd.errors import NemoKDError
from nemo_kd.loss import KDConfig
from nemo_kd.mcore.blend import EndlessBlend
from nemo_kd.mcore.context import on_last_stage, own_positions
from nemo_kd.mcore.mix import Source, Sources, sources_of
from nemo_kd.sft.rows import SFTRows
from nemo_kd.store import Store
from nemo_kd.store.sample import Sample, Tokens
from nemo_kd.store.tools.overlap import TWICE, in_common
from nemo_kd.teacher.processes import say_once
from nemo_kd.topk import TopK

Batch = dict[str, Any]
"""A micro-batch on the CPU: `tokens`, `labels`, `loss_mask` and `position_ids` [B, S / C];
`answers`, an `AnswerTokens`, or None on pipeline stages before the last; `answer_tokens`, their
number on all C context-parallel ranks; with packs also `cu_seqlens` [sequences + 1] int32 and two
ints, `max_seqlen`, for which padding is a sequence too, and `longest`, for which it is not;
`vocab_size`, an int, or None without a store; `stores`, the `StoreFacts` of all stores."""

PAD_ID = 0


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
    pack. `packed` needs micro-batches of one pack, and no context parallelism. `naming`: how
    messages name `seq_length` and `over_long`. Rank 0 prints how many samples are truncated or
    dropped, and a warning of teacher's rows that do not belong to their labels.

    Errors: StoreError for samples that are too long (see `over_long` of `fit_lengths`), for a
    temperature that was not dumped, and for sources of different tokenizers; NemoKDError for
    weights of only some sources, for packs of SFT rows, and for a `seq_length` or `seed` that is no
    integer in its range.
    """

    def __init__(
        self,
        sources: Sources,
        *,
        seq_length: int,
        temperature: float = 1.0,
        seed: int = 0,
        over_long: str = "error",
        packed: bool = False,
        shuffle: bool = True,
        naming: Naming = str,
    ) -> None:
        check_integers(1, seq_length=seq_length)
        check_integers(0, seed=seed)
        self.sources = sources_of(sources)
        self.naming = naming
        self.seq_length, self.temperature = seq_length, temperature
        self.seed, self.over_long, self.packed, self.shuffle = seed, over_long, packed, shuffle
        self._check()
        self._readers = [self._reader(source) for source in self.sources]
        sizes = [len(reader) for reader in self._readers]
        given = [source.weight for source in self.sources if source.weight is not None]
        self._blend = EndlessBlend(given or sizes)
        self._size = sum(sizes)
        self.with_answers = True
        """Whether items have the teacher's rows; see `place`."""
        self._orders = [
            _Order(size, [seed, which] if which else [seed], shuffle)
            for which, size in enumerate(sizes)
        ]

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, draw: int) -> Item:
        check_integers(0, draw=draw)
        which, number = self._blend[draw]
        return self._readers[which][self._orders[which][number]]

    @cached_property
    def own_positions(self) -> torch.Tensor | None:
        """This context-parallel rank's positions, for process groups that start after the check."""
        return own_positions(self.seq_length)

    def place(self) -> None:
        """Settle what this process needs of a batch, from Megatron's process groups.

        The positions of its context-parallel rank; teacher's rows on the last pipeline stage only.
        To be called in the training process: a data loader's worker that was not forked has no
        groups, and would return complete sequences.
        """
        self.own_positions = own_positions(self.seq_length)
        self.with_answers = on_last_stage()

    def evaluated(self, draw: int, size: int) -> Item:
        """Return an item of evaluations of `size` items each, which start at the first item.

        Beyond the last item of the data set: one without an answer token.
        """
        number = draw % size
        return self[number] if number < len(self) else without_answers(self[0])

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the sequence of items, for comparison when a run is resumed."""
        return {
            "sources": [source.fingerprint for source in self.sources],
            "weights": list(map(float, self._blend.weights)),
            "items": [len(reader) for reader in self._readers],
            "seq_length": self.seq_length,
            "seed": self.seed,
            "packed": self.packed,
            "shuffle": self.shuffle,
        }

    @property
    def vocab_size(self) -> int | None:
        """The size of the stores' vocabulary; None without a store."""
        return next((store.spec.vocab_size for store in self._stores), None)

    @property
    def _stores(self) -> list[Store]:
        return [source.data for source in self.sources if isinstance(source.data, Store)]

    @cached_property
    def facts(self) -> tuple[StoreFacts, ...]:
        """What decides whether a loss can learn from the stores."""
        pairs = [(each.data, each.alpha) for each in self.sources]
        return tuple(
            StoreFacts(str(data.origin), data.spec, alpha)
            for data, alpha in pairs
            if isinstance(data, Store)
        )

    def check(self, config: KDConfig, *, training: bool = True, naming: Naming = FIELD) -> None:
        """Refuse stores from which the loss of `config` learns nothing, or only with a bias.

        `StepLoss` does it at the first micro-batch too. Errors: StoreError and NemoKDError, as
        `nemo_kd.data.learnable.check_stores`.
        """
        check_stores(self.facts, config, training=training, naming=naming)

    def collate_fn(self, items: Sequence[Item]) -> Batch:
        """Collate the items of a micro-batch, this context-parallel rank's part of it."""
        batch = self._packs(items) if self.packed else self._padded(items)
        own = self.own_positions
        mine = {name: x if own is None else x[:, own] for name, x in batch.items()}
        return {
            **mine,
            "answers": self._answers(batch["loss_mask"], items),
            "answer_tokens": int(batch["loss_mask"].count_nonzero()),
            "vocab_size": self.vocab_size,
            "stores": self.facts,
        }

    def _answers(self, loss_mask: torch.Tensor, items: Sequence[Item]) -> AnswerTokens | None:
        if not self.with_answers:
            return None
        teachers, alphas = [item.teacher for item in items], [item.alpha for item in items]
        return answer_tokens(loss_mask, teachers, alphas, self.own_positions)

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
            "longest": max(len(part.input_ids) - 1 for part in items[0].parts),
        }

    def _check(self) -> None:
        if not self.sources:
            raise NemoKDError("no store and no file to train on: give at least one Source")
        fingerprints = [source.tokenizer for source in self.sources]
        known = next((each for each in fingerprints if each is not None), None)
        for store in self._stores:
            store.check(
                temperature=self.temperature,
                tokenizer_fingerprint=known,
                vocab_size=self.vocab_size,
            )
        for source, fingerprint in zip(self.sources, fingerprints, strict=True):
            if fingerprint not in (None, known):
                raise NemoKDError(
                    f"{source.name} is tokenized by another tokenizer than {self.sources[0].name}: "
                    "open its rows with the stores' tokenizer"
                )
        say_once([TWICE.format(sentence) for sentence in in_common(self._stores)])
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


class _Order:
    """The items of a source in the order of endless epochs."""

    def __init__(self, size: int, seed: list[int], shuffle: bool) -> None:
        self.size, self.seed, self.shuffle = size, seed, shuffle
        self._epochs: dict[int, NDArray[np.int64]] = {}

    def __getitem__(self, number: int) -> int:
        epoch, position = divmod(number, self.size)
        return int(self._permutation(epoch)[position]) if self.shuffle else position

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._epochs:
            # The last two, since a batch may extend into the next epoch.
            self._epochs = {k: v for k, v in self._epochs.items() if k == epoch - 1}
            seed, *which = self.seed
            self._epochs[epoch] = np.random.default_rng([seed, epoch, *which]).permutation(
                self.size
            )
        return self._epochs[epoch]


class _Samples:
    """The samples of a store that fit."""

    def __init__(self, store: Store, alpha: float | None, dataset: KDDataset) -> None:
        self.store, self.alpha, self.dataset = store, alpha, dataset
        self.length, self.temperature = dataset.seq_length + 1, dataset.temperature
        limit = LengthLimit.of_inputs(dataset.seq_length, dataset.naming)
        self.fitting = fit_lengths(store, limit, dataset.over_long)
        say_once(notices(store, self.fitting, limit))

    def __len__(self) -> int:
        return len(self.fitting.used)

    def __getitem__(self, index: int) -> Item:
        sample = truncate_prompt(self._stored(int(self.fitting.used[index])), self.length)
        teacher = teacher_of(sample, self.temperature)
        if self.alpha == 0:  # any loss may have draws with a weight of 0
            teacher = replace(teacher, draws=False)
        return Item([sample], teacher, self.alpha)

    def _stored(self, index: int) -> Sample:
        if self.dataset.with_answers:
            return self.store[index]
        tokens, _ = self.store.encoded(index)  # not decoded
        rows = no_teacher(0, self.temperature)
        return Sample(tokens.row, tokens.input_ids, tokens.loss_mask, rows)


class _Packed:
    """Packs of the samples of a store."""

    def __init__(self, samples: _Samples, dataset: KDDataset) -> None:
        self.samples = samples
        seed = dataset.seed if dataset.shuffle else None
        self.packs = pack_samples(
            samples.store, samples.fitting, dataset.seq_length, seed, samples.length
        ).packs

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


def without_answers(item: Item) -> Item:
    """Return the item with a loss mask of zeros: it adds nothing to any sum."""
    parts = [replace(part, loss_mask=np.zeros_like(part.loss_mask)) for part in item.parts]
    return Item(parts, no_teacher(0, item.teacher.temperatures[0]), 0.0)


def check_integers(smallest: int, **values: object) -> None:
    """Refuse values that are not integers of at least `smallest`.

    Errors: NemoKDError, naming the value.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < smallest:
            raise NemoKDError(f"{name}={value!r}: expected an integer of at least {smallest}")
