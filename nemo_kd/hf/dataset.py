"""The samples of one or several stores as a torch data set."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nemo_kd.data import LengthLimit, check_schedule, fit_lengths, notices, truncate_prompt
from nemo_kd.loss import KDConfig
from nemo_kd.store import Sample, Store, StoreError
from nemo_kd.store.fingerprint import vocabulary_fingerprint
from nemo_kd.store.tools.overlap import TWICE, in_common
from nemo_kd.teacher.processes import say_once
from nemo_kd.vocabulary import VocabularySize


class StoreDataset(torch.utils.data.Dataset[Sample]):
    """Samples of `stores`, one store after the other, for a distillation by `config`.

    `max_seq_length`: most tokens of a sample, prompt and answer; None: no limit. `over_long`:
    `error`, `truncate` or `drop` longer samples, as `model.data.train_ds.over_long` of a NeMo
    training does. `tokenizer`: the student's, of transformers, to compare with the stores'.
    A data set is picklable: a worker process opens the stores again.

    Errors: StoreError for a store that `config` cannot learn from, without samples or answer
    tokens, with too long samples, without the temperature, of another tokenizer, or of another
    vocabulary than the first.
    """

    def __init__(
        self,
        stores: Store | str | Path | Sequence[Store | str | Path],
        config: KDConfig,
        *,
        max_seq_length: int | None = None,
        over_long: str = "error",
        tokenizer: Any = None,
    ) -> None:
        each = [stores] if isinstance(stores, Store | str | Path) else list(stores)
        if not each:
            raise StoreError("no store to train on: give at least one directory")
        self.config = config
        self.stores = tuple(one if isinstance(one, Store) else Store(one) for one in each)
        say_once([TWICE.format(sentence) for sentence in in_common(self.stores)])
        self.max_seq_length = max_seq_length
        self.vocab_size = self.stores[0].spec.vocab_size
        """Number of ids of the tokenizer; further columns of a model's logits are padding."""
        self.top_k = max(store.spec.top_k for store in self.stores)
        """Most ids per answer token."""
        fingerprint = self.stores[0].spec.tokenizer.get("fingerprint")
        self.compares_tokenizer = tokenizer is not None
        """Whether the stores have the student's tokenizer."""
        if tokenizer is not None:
            check_tokenizer(self.stores, tokenizer)
        for store in self.stores:
            store.check(
                tokenizer_fingerprint=fingerprint,
                vocab_size=self.vocab_size,
                temperature=config.temperature,
            )
            check_schedule(store, config)
        self._used = [_used(store, max_seq_length, over_long) for store in self.stores]
        self._ends = list(accumulate(map(len, self._used)))

    @property
    def longest(self) -> int:
        """Most tokens of a sample."""
        pairs = zip(self.stores, self._used, strict=True)
        longest = max(int(store.lengths[used].max()) for store, used in pairs)
        return longest if self.max_seq_length is None else min(longest, self.max_seq_length)

    @property
    def chat_template(self) -> Any:
        """The chat template of the stores' rows, for the student's tokenizer.

        None if they have none, have NeMo's turns or differ in it.
        """
        first, *others = (store.spec.template.get("chat_template") for store in self.stores)
        return None if first == "nemo" or any(other != first for other in others) else first

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index %= len(self)
        number = bisect_right(self._ends, index)
        start = self._ends[number - 1] if number else 0
        sample = self.stores[number][int(self._used[number][index - start])]
        return (
            sample if self.max_seq_length is None else truncate_prompt(sample, self.max_seq_length)
        )


def datasets_in(data: Any) -> list[StoreDataset]:
    """Return the data sets of samples in torch's `Subset` and `ConcatDataset`, and in their like.

    Empty for a data set of another kind.
    """
    if isinstance(data, StoreDataset):
        return [data]
    return [one for each in wrapped_in(data) for one in datasets_in(each)]


def wrapped_in(data: Any) -> list[Any]:
    """Return the data sets that torch's `Subset` or `ConcatDataset`, or their like, is made of."""
    one = getattr(data, "dataset", None)
    return [*getattr(data, "datasets", ()), *([] if one is None else [one])]


def check_tokenizer(stores: Iterable[Store], tokenizer: Any) -> None:
    """Raise StoreError unless `tokenizer`, of transformers, is that of the stores."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(VocabularySize.of(tokenizer).ids)))
    fingerprint = vocabulary_fingerprint(tokens)
    for store in stores:
        store.check(tokenizer_fingerprint=fingerprint)


def _used(store: Store, max_seq_length: int | None, over_long: str) -> NDArray[np.int64]:
    """Return the store's indices of the samples to use [samples]."""
    if not len(store):
        raise StoreError(f"store {store.origin} has no samples")
    if not store.manifest.totals["answer_tokens"]:
        raise StoreError(f"store {store.origin} has no answer tokens, so nothing to learn from")
    limit = LengthLimit(int(store.lengths.max()) if max_seq_length is None else max_seq_length)
    fitting = fit_lengths(store, limit, over_long)
    say_once(notices(store, fitting, limit))
    return fitting.used
