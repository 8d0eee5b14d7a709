"""Stores as a data set of Megatron-Bridge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.bridge.training.config import DatasetBuildContext, DatasetProvider

from nemo_kd.errors import NemoKDError
from nemo_kd.loss import KDConfig
from nemo_kd.mcore.dataset import Batch, Item, KDDataset
from nemo_kd.mcore.mix import Source
from nemo_kd.sft.tokenizer import HFTokenizer, first_difference, tokenizer_fingerprint
from nemo_kd.store import Store, StoreError


@dataclass(kw_only=True)
class KDSource:
    """A store in a training, or in an evaluation."""

    path: str
    """Directory of the store."""
    alpha: float | None = None
    """Weight of the distillation for the samples of this store; None: that of the training."""
    weight: float | None = None
    """Share of the draws, relative to the other stores; None in all: their numbers of samples."""


@dataclass(kw_only=True)
class KDDataConfig(DatasetProvider):
    """The block `dataset` of a `ConfigContainer`: stores to train on and to evaluate on.

    The order of the samples depends only on `seed` and the stores, so a run that continues from a
    checkpoint's `consumed_train_samples` sees what the uninterrupted run would have seen.
    """

    train: list[KDSource]
    """Stores to train on."""
    valid: list[KDSource] = field(default_factory=list)
    """Stores to evaluate on; none: no evaluation."""
    student: str | None = None
    """Directory of the student's Hugging Face tokenizer, which must be that of the stores; None: it
    is not compared."""
    seq_length: int = 2048
    """Number of inputs of a sample, which has at most `seq_length + 1` tokens, or of a pack. It
    must be the model's `seq_length`."""
    temperature: float = 1.0
    """Temperature of the distillation; the stores must have the log-sum-exp at it."""
    seed: int = 1234
    """Seed of the order of samples."""
    over_long: str = "error"
    """`error`, `truncate` or `drop` samples of more than `seq_length + 1` tokens."""
    packed: bool = False
    """Train on packs of `seq_length` tokens, one pack per micro-batch."""
    samples_per_evaluation: int | None = None
    """Items of one evaluation, which always begins with the first; set by `finetune`."""
    dataloader_type: str | None = "single"
    """Bridge's sampler: `single`, in the order of the data set, which is shuffled itself."""
    num_workers: int = 2
    """Worker processes per rank that read the stores."""

    def build_datasets(self, context: DatasetBuildContext) -> tuple[Any, Any, None]:
        """Build Bridge's training and validation data; called by Bridge.

        Errors: StoreError for a store that does not fit, NemoKDError for another `dataloader_type`.
        """
        if self.dataloader_type != "single":
            raise NemoKDError(
                f"dataset.dataloader_type={self.dataloader_type} would draw other samples than "
                "those of the stores' order; set it to single"
            )
        train = TrainingItems(self.training_data(), context.train_samples)
        if not self.valid:
            return train, None, None
        size = self.samples_per_evaluation or len(self.validation_data())
        valid = EvaluationItems(self.validation_data(), size, context.valid_samples)
        return train, valid, None

    def training_data(self) -> KDDataset:
        """Open the training stores, shuffled."""
        return self._data(self.train, shuffle=True)

    def validation_data(self) -> KDDataset:
        """Open the validation stores, in their order."""
        return self._data(self.valid, shuffle=False)

    def check(self, config: KDConfig) -> None:
        """Refuse stores from which the loss of `config` learns nothing, or only with a bias.

        Errors: StoreError.
        """
        if config.temperature != self.temperature:
            raise NemoKDError(
                f"dataset.temperature={self.temperature}, but the loss has "
                f"temperature={config.temperature}; set both alike"
            )
        self.training_data().check(config)
        if self.valid:
            self.validation_data().check(config, training=False)

    def vocab_size(self) -> int:
        """Return the number of ids of the stores' tokenizer."""
        return Store(self.train[0].path).spec.vocab_size

    def _data(self, sources: Sequence[KDSource], *, shuffle: bool) -> KDDataset:
        stores = [Source(self._store(s.path), alpha=s.alpha, weight=s.weight) for s in sources]
        return KDDataset(
            stores,
            seq_length=self.seq_length,
            temperature=self.temperature,
            seed=self.seed,
            over_long=self.over_long,
            packed=self.packed,
            shuffle=shuffle,
        )

    def _store(self, path: str) -> Store:
        store = Store(path)
        if self.student is None:
            return store
        tokenizer = HFTokenizer(Path(self.student))
        try:
            store.check(
                tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
                vocab_size=tokenizer.vocab_size,
            )
        except StoreError as error:
            raise StoreError(
                f"{error}{first_difference(tokenizer, store.spec.tokenizer)}"
            ) from error
        return store


class TrainingItems(torch.utils.data.Dataset[Item]):
    """The first `size` draws of an endless data set, for a sampler that needs to know the end."""

    def __init__(self, data: KDDataset, size: int) -> None:
        self.data, self.size = data, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, draw: int) -> Item:
        return self.data[draw]

    def collate_fn(self, items: Sequence[Item]) -> Batch:
        """`KDDataset.collate_fn`."""
        return self.data.collate_fn(items)


class EvaluationItems(TrainingItems):
    """Evaluations of `one` items each: those of the data, then items without an answer token."""

    def __init__(self, data: KDDataset, one: int, size: int) -> None:
        super().__init__(data, size)
        self.one = one

    def __getitem__(self, draw: int) -> Item:
        return self.data.evaluated(draw, self.one)
