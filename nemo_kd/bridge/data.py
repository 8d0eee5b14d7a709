"""Stores and SFT files as a data set of Megatron-Bridge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from megatron.bridge.training.config import DatasetBuildContext, DatasetProvider

from nemo_kd.errors import NemoKDError
from nemo_kd.loss import KDConfig
from nemo_kd.mcore.dataset import Batch, Item, KDDataset
from nemo_kd.mcore.files import open_file
from nemo_kd.mcore.mix import Source
from nemo_kd.sft.rows import SFTRows
from nemo_kd.sft.tokenizer import HFTokenizer, first_difference, tokenizer_fingerprint
from nemo_kd.store import Store, StoreError
from nemo_kd.teacher.processes import say_once

Opened = TypeVar("Opened")


@dataclass(kw_only=True)
class KDSource:
    """A store, or an SFT file without a teacher, in a training or in an evaluation.

    One of `path` and `file` is given.
    """

    path: str | None = None
    """Directory of the store."""
    file: str | None = None
    """SFT file, or a glob of several: JSONL, JSON, Parquet, or a directory that `datasets` saved.
    Its rows are trained with cross-entropy only."""
    alpha: float | None = None
    """Weight of the distillation for the samples of this store; None: that of the training."""
    weight: float | None = None
    """Share of the draws, relative to the other sources; None in all: their numbers of samples."""


@dataclass(kw_only=True)
class KDDataConfig(DatasetProvider):
    """The block `dataset` of a `ConfigContainer`: what to train on and to evaluate on.

    The order of the samples depends only on `seed` and the sources, so a run that continues from a
    checkpoint's `consumed_train_samples` sees what the uninterrupted run would have seen.
    """

    train: list[KDSource]
    """Stores and SFT files to train on."""
    valid: list[KDSource] = field(default_factory=list)
    """Stores and SFT files to evaluate on; none: no evaluation."""
    student: str | None = None
    """Directory of the student's Hugging Face tokenizer, which must be that of the stores and
    tokenizes SFT files; None, without a file: it is not compared."""
    rows: dict[str, Any] = field(default_factory=dict)
    """How SFT files are read: keys of a dump's `data`, such as `prompt_template`, and
    `answer_only_loss`. Others have the values with which the stores of `train` were dumped. Rows
    are truncated to `seq_length + 1` tokens."""
    seq_length: int = 2048
    """Number of inputs of a sample, which has at most `seq_length + 1` tokens, or of a pack. It
    must be the model's `seq_length`."""
    temperature: float = 1.0
    """Temperature of the distillation; the stores must have the log-sum-exp at it."""
    seed: int = 1234
    """Seed of the order of samples."""
    over_long: str = "error"
    """`error`, `truncate` or `drop` samples of stores with more than `seq_length + 1` tokens."""
    packed: bool = False
    """Train on packs of `seq_length` tokens, one pack per micro-batch."""
    samples_per_evaluation: int | None = None
    """Items of one evaluation, which always begins with the first; set by `finetune`."""
    dataloader_type: str | None = "single"
    """Bridge's sampler: `single`, in the order of the data set, which is shuffled itself."""
    num_workers: int = 2
    """Worker processes per rank that read the stores and files."""

    def __post_init__(self) -> None:
        # No field: fields are written into checkpoints. Bridge calls this method a second time.
        self._opened: dict[str, Any] = vars(self).get("_opened", {})

    def build_datasets(self, context: DatasetBuildContext) -> tuple[Any, Any, None]:
        """Build Bridge's training and validation data; called by Bridge.

        Errors: StoreError for a store that does not fit, NemoKDError for another `dataloader_type`.
        """
        if self.dataloader_type != "single":
            raise NemoKDError(
                f"dataset.dataloader_type={self.dataloader_type} would draw other samples than "
                "those of the stores' order; set it to single"
            )
        self.training_data().place()  # before data-loader workers start
        train = TrainingItems(self.training_data(), context.train_samples)
        if not self.valid:
            return train, None, None
        self.validation_data().place()
        size = self.samples_per_evaluation or len(self.validation_data())
        valid = EvaluationItems(self.validation_data(), size, context.valid_samples)
        return train, valid, None

    def training_data(self) -> KDDataset:
        """Return the data of `train`, shuffled; opened once for the same settings.

        Errors: NemoKDError for sources that do not fit each other, the student or the settings.
        """
        return self._data(self.train, shuffle=True)

    def validation_data(self) -> KDDataset:
        """Return the data of `valid`, in its order; opened once for the same settings.

        Errors: as `training_data`.
        """
        return self._data(self.valid, shuffle=False)

    def check(self, config: KDConfig) -> None:
        """Refuse stores from which the loss of `config` learns nothing, or only with a bias.

        Errors: StoreError; NemoKDError for settings that do not fit each other.
        """
        if config.temperature != self.temperature:
            raise NemoKDError(
                f"dataset.temperature={self.temperature}, but the loss has "
                f"temperature={config.temperature}; set both alike"
            )
        if self.rows and not any(source.file for source in (*self.train, *self.valid)):
            raise NemoKDError(
                f"dataset.rows={self.rows} is for SFT files, but there are only stores; leave it "
                "out, or add a KDSource(file=...)"
            )
        self.training_data().check(config)
        if self.valid:
            self.validation_data().check(config, training=False)

    def vocab_size(self) -> int:
        """Return the number of ids of the stores' tokenizer; of the student's without a store."""
        return self.training_data().vocab_size or self._tokenizer("train").vocab_size

    def _data(self, given: Sequence[KDSource], *, shuffle: bool) -> KDDataset:
        options: dict[str, Any] = {
            "seq_length": self.seq_length,
            "temperature": self.temperature,
            "seed": self.seed,
            "over_long": self.over_long,
            "packed": self.packed,
            "shuffle": shuffle,
        }
        settings = (self.train, given, self.student, self.rows, options)
        return self._once(
            f"data {settings}", lambda: KDDataset([*map(self._source, given)], **options)
        )

    def _source(self, source: KDSource) -> Source:
        if bool(source.path) == bool(source.file):
            raise NemoKDError(
                f"{source} of dataset: give either path, a store, or file, an SFT file"
            )
        data = self._store(source.path) if source.path else self._file(str(source.file))
        return Source(data, alpha=source.alpha, weight=source.weight)

    def _file(self, path: str) -> SFTRows:
        return open_file(
            path,
            self._tokenizer(path),
            seq_length=self.seq_length,
            stores=[self._store(each.path) for each in self.train if each.path],
            settings=self.rows,
            where="dataset.rows",
            say=lambda text: say_once([text]),
        )

    def _store(self, path: str) -> Store:
        return self._once(f"store {path} {self.student}", lambda: self._checked_store(path))

    def _checked_store(self, path: str) -> Store:
        store = Store(path)
        if self.student is None:
            return store
        tokenizer = self._tokenizer(path)
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

    def _tokenizer(self, path: str) -> HFTokenizer:
        if self.student is None:
            raise NemoKDError(
                f"{path} is an SFT file, and dataset.student is None: give the directory of the "
                "student, whose tokenizer it needs"
            )
        student = Path(self.student)
        return self._once(f"tokenizer {student}", lambda: HFTokenizer(student))

    def _once(self, name: str, opened: Callable[[], Opened]) -> Opened:
        if name not in self._opened:
            self._opened[name] = opened()
        found: Opened = self._opened[name]
        return found


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
