"""Samples of Megatron-LM's saved log-probabilities, with the tokens of the data beside them.

The data is in the order of the run, sample by sample: JSONL with

    input_ids   [S + 1] or fewer     and optionally      loss_mask   [S + 1]  1 for answer tokens
    tokens, labels  [S]  instead     and optionally      loss_mask   [S]      as in its batches

or a Megatron indexed data set with a sequence of at most S + 1 tokens for each sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nemo_kd.errors import StoreError
from nemo_kd.store.checks import checked_tokens
from nemo_kd.store.indexed import sequences
from nemo_kd.store.sample import Sample, Tokens
from nemo_kd.store.spec import StoreSpec
from nemo_kd.store.tools.lines import lines_of, list_in, record_of, skip_or_raise
from nemo_kd.store.tools.logprobs import Changes, sample_of
from nemo_kd.store.tools.megatron_shards import MicroBatch, iterations


class _Row(NamedTuple):
    where: str
    input_ids: NDArray[Any]
    loss_mask: NDArray[Any]


def read_megatron(
    directory: Path,
    data: Path,
    spec: StoreSpec,
    changes: Changes,
    *,
    on_bad_row: Callable[[StoreError], None] | None = None,
) -> Iterator[Sample]:
    """Yield the samples of a directory of shards; a sample's row is its number in the data.

    Raises StoreError, naming shard or row, if shards are damaged or the data does not fit them;
    with `on_bad_row` a row that does not fit is left out and the error passed to that function.
    """
    rows, read = _rows(data), 0
    per_iteration: int | None = None
    for iteration, batches in iterations(directory):
        samples = sum(each.ids.shape[1] for each in batches)
        if per_iteration not in (None, samples):
            raise StoreError(
                f"{directory}: iteration {iteration} has {samples} samples, others "
                f"{per_iteration}; runs whose batch size changes are not supported"
            )
        per_iteration = samples
        number = iteration * samples
        for _ in range(number - read):  # of iterations that were not saved
            _next(rows, data, iteration)
        for batch in batches:
            for b in range(batch.ids.shape[1]):
                row = _next(rows, data, iteration)
                try:
                    yield _sample(number, row, batch, b, spec, changes)
                except StoreError as error:
                    bad = StoreError(f"{row.where}, iteration {iteration}: {error}")
                    skip_or_raise(bad, error, on_bad_row)
                number += 1
        read = number


def _next(rows: Iterator[_Row], data: Path, iteration: int) -> _Row:
    row = next(rows, None)
    if row is None:
        raise StoreError(
            f"{data} ends within iteration {iteration} of the shards; it must have a row for each "
            "of the run's samples, in their order"
        )
    return row


def _sample(
    number: int, row: _Row, batch: MicroBatch, b: int, spec: StoreSpec, changes: Changes
) -> Sample:
    input_ids, checked, _ = checked_tokens(row.input_ids, row.loss_mask, spec.vocab_size)
    mask = checked.copy()
    mask[0] = 0  # nothing predicts the first token
    length = len(batch.ids)
    if input_ids.size > length + 1:
        raise StoreError(
            f"{input_ids.size} tokens, but the shards have predictions of {length}; at most "
            f"{length + 1} belong to them"
        )
    entries = np.flatnonzero(mask[1:])
    ids, logprobs = batch.ids[entries, b], batch.logprobs[entries, b]
    missing = spec.top_k - ids.shape[1]
    if missing > 0:  # top-P left fewer in this micro-batch
        ids = np.pad(ids, ((0, 0), (0, missing)), constant_values=-1)
        logprobs = np.pad(logprobs, ((0, 0), (0, missing)), constant_values=-np.inf)
    return sample_of(Tokens(number, input_ids, mask), ids, logprobs, spec, changes)


def _rows(data: Path) -> Iterator[_Row]:
    if data.suffix not in (".jsonl", ".json"):
        for number, tokens in enumerate(sequences(data)):
            yield _Row(f"{data}, sequence {number}", tokens, np.ones(tokens.size, np.uint8))
        return
    for number, line in lines_of(data):
        where = f"{data}, line {number}"
        try:
            yield _Row(where, *_of_record(record_of(line)))
        except StoreError as error:
            raise StoreError(f"{where}: {error}") from error


def _of_record(record: dict[str, Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return input_ids [S + 1] and loss_mask [S + 1] of a line."""
    mask = list_in(record, "loss_mask", "iufb", 1) if "loss_mask" in record else None
    if "input_ids" in record:
        ids = list_in(record, "input_ids", "iu", 1)
        return ids, np.ones(ids.size, np.uint8) if mask is None else mask
    missing = [key for key in ("tokens", "labels") if key not in record]
    if missing:
        raise StoreError(f"no input_ids, nor {' and '.join(missing)}")
    tokens, labels = (list_in(record, key, "iu", 1) for key in ("tokens", "labels"))
    mask = np.ones(labels.size, np.uint8) if mask is None else mask
    if not tokens.size == labels.size == mask.size or not tokens.size:
        raise StoreError("tokens, labels and loss_mask have different lengths, or none")
    last = int(np.flatnonzero(mask)[-1]) + 1 if mask.any() else tokens.size
    if (labels[: last - 1] != tokens[1:last]).any():
        raise StoreError("labels are not the tokens shifted by one")
    return np.append(tokens[:last], labels[last - 1]), np.append(0, mask[:last])
