"""Stream samples from and to NeMo-Aligner's JSONL, one sample per line.

    tokens             [S-1]      input_ids[:-1]
    labels             [S-1]      input_ids[1:]
    loss_mask          [S-1]      1 where the label is an answer token
    topk_logits        [S-1][K]   in descending order; read at answer tokens only
    topk_token_ids     [S-1][K]
    log_sum_exp_logits [S-1]      log Σ_v exp(z_v)
    index              row number in the source (the line number if the key is missing)

NeMo-Aligner subtracts the largest logit first, which does not change the log-probabilities. In a
path, `CHUNK_ID` stands for the chunk numbers 0, 1, 2, ... Logits are written with five decimals.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_kd.errors import StoreError
from nemo_kd.outputs import install, refuse_directory, work_beside
from nemo_kd.store.checks import checked_tokens, checked_topk, deep_faults
from nemo_kd.store.sample import Sample
from nemo_kd.store.spec import StoreSpec
from nemo_kd.store.tools.chunks import (
    CHUNK_ID,
    chunk_paths,
    existing_chunks,
    publish_chunks,
)
from nemo_kd.store.tools.lines import check_ascending, lines_of, list_in, record_of, skip_or_raise
from nemo_kd.store.tools.padding import Padding, width_of, without_padding
from nemo_kd.topk import ABSENT_ID, TopK

DECIMALS = 5
ABSENT_LOG_PROBABILITY = -10_000.0  # together with id 0 marks an absent entry
KEYS = ("tokens", "labels", "loss_mask", "topk_logits", "topk_token_ids", "log_sum_exp_logits")


def read_jsonl(
    path: str | Path,
    spec: StoreSpec,
    *,
    renumber: bool = False,
    on_bad_line: Callable[[StoreError], None] | None = None,
    padding: Padding | None = None,
    widths: Counter[int] | None = None,
) -> Iterator[Sample]:
    """Yield the samples of `path` at T = 1, cut to the first `spec.top_k` logits.

    An invalid line raises StoreError with file and line number; with `on_bad_line` it is skipped
    and the error is passed to that function. An index far larger than the number of lines is
    invalid: it would leave nearly all rows of the store empty. With `renumber` a sample's row is
    its line number, counted from 0 across all chunks.

    NeMo-Aligner's top-K may include ids of Megatron's vocabulary padding. These ids are dropped and
    counted in `padding`; if that is None, a warning at the end reports their number. The
    log-sum-exp is unchanged, so that their probability counts towards the tail mass. `widths`
    counts the samples by the largest number of ids that a token of theirs has in the file.
    """
    if spec.temperatures != (1.0,):
        raise StoreError(
            "NeMo-Aligner's JSONL has a log-sum-exp at temperature 1.0 only, but the store would "
            f"have {list(spec.temperatures)}; leave temperatures at [1.0]"
        )
    lines, last_row = count(), -1
    dropped = Padding() if padding is None else padding
    for file_path in chunk_paths(path):
        for number, line in lines_of(file_path):
            row = next(lines)
            try:
                sample, width = _sample(line, row, renumber, spec, dropped)
                check_ascending(sample.row, last_row, row)
            except StoreError as error:
                bad = StoreError(f"{file_path}, line {number}: {error}")
                skip_or_raise(bad, error, on_bad_line)
                continue
            last_row = sample.row
            if widths is not None:
                widths[width] += 1
            yield sample
    if padding is None and dropped.ids:
        warnings.warn(f"{path}: dropped {dropped.ids} padding ids of the vocabulary", stacklevel=2)


def write_jsonl(
    path: str | Path,
    samples: Iterable[Sample],
    *,
    samples_per_chunk: int | None = None,
) -> int:
    """Write samples, such as those of a `Store`, to `path`; return their number.

    The file appears, or replaces an existing one, once it is complete.

    Positions without an answer token are filled with zeros: NeMo-Aligner needs a row for each
    position and masks these. With CHUNK_ID in `path`, each chunk has `samples_per_chunk` samples,
    and existing chunks are replaced.
    """
    name = str(path)
    if (CHUNK_ID in name) != (samples_per_chunk is not None):
        raise StoreError(
            f"{name}: give both {CHUNK_ID} in the path and a number of samples per chunk, or "
            f"neither; the number is {samples_per_chunk}"
        )
    if samples_per_chunk is not None and samples_per_chunk < 1:
        raise StoreError(f"samples per chunk must be at least 1, not {samples_per_chunk}")
    records = (_record(sample) for sample in samples)
    if samples_per_chunk is None:
        target = Path(name).parent.resolve() / Path(name).name  # a link is replaced, not followed
        refuse_directory(target)
        with work_beside(target) as work:
            written = _write_file(work / "0", records)
            install(work / "0", target)
        return written
    existing_chunks(name)  # fail before the work if a chunk cannot be replaced
    written, chunks = 0, list[Path]()
    with work_beside(_above_chunks(Path(name).absolute())) as work:
        for number, first in enumerate(records):
            chunks.append(work / str(number))
            rest = islice(records, samples_per_chunk - 1)
            written += _write_file(chunks[-1], chain([first], rest))
        publish_chunks(name, chunks)
    return written


def _above_chunks(path: Path) -> Path:
    """Return the topmost part of a path with CHUNK_ID in it."""
    parts = [one for one in (path, *path.parents) if CHUNK_ID in one.name]
    return parts[-1].parent.resolve() / parts[-1].name


def _write_file(path: Path, records: Iterable[dict[str, Any]]) -> int:
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")
            written += 1
    return written


def _record(sample: Sample) -> dict[str, Any]:
    topk = sample.topk.at(1.0)
    answers = sample.answer_positions() - 1  # [A]: indices of tokens and labels
    length = len(sample.input_ids) - 1
    ids = np.zeros((length, topk.ids.shape[1]), np.int64)
    logits = np.zeros(ids.shape)
    logsumexp = np.zeros(length)
    logsumexp[answers] = topk.logsumexp
    absent = topk.ids == ABSENT_ID
    ids[answers] = np.where(absent, 0, topk.ids)
    floor = topk.logsumexp[:, None] + np.float32(ABSENT_LOG_PROBABILITY)
    logits[answers] = np.where(absent, floor, topk.logits)
    return {
        "tokens": sample.input_ids[:-1].tolist(),
        "labels": sample.input_ids[1:].tolist(),
        "loss_mask": sample.loss_mask[1:].tolist(),
        "topk_logits": logits.round(DECIMALS).tolist(),
        "topk_token_ids": ids.tolist(),
        "log_sum_exp_logits": logsumexp.round(DECIMALS).tolist(),
        "index": sample.row,
    }


def _sample(
    line: bytes, row: int, renumber: bool, spec: StoreSpec, padding: Padding
) -> tuple[Sample, int]:
    """Return the sample of a line, and the largest number of ids that a token has in the line."""
    record = record_of(line)
    missing = [key for key in KEYS if key not in record]
    if missing:
        raise StoreError(f"no {', '.join(missing)} among the keys {sorted(map(str, record))}")
    index = record.get("index", row)
    if not renumber and (type(index) is not int or index < 0):
        raise StoreError(f"index must be a row number, not {index!r}")
    return _checked(record, row if renumber else index, spec, padding)


def _checked(
    record: dict[str, Any], row: int, spec: StoreSpec, padding: Padding
) -> tuple[Sample, int]:
    tokens, labels = list_in(record, "tokens", "iu", 1), list_in(record, "labels", "iu", 1)
    mask = list_in(record, "loss_mask", "iufb", 1)
    length = len(tokens)
    if not len(labels) == len(mask) == length >= 1:
        raise StoreError(
            f"tokens, labels and loss_mask have {length}, {len(labels)} and {len(mask)} values; "
            "they must have the same number, at least 1"
        )
    checked_tokens(tokens, mask, spec.vocab_size)
    answers = np.flatnonzero(mask)
    # Everything after the last answer token is padding.
    end = int(answers[-1]) + 1 if answers.size else length
    if (labels[: end - 1] != tokens[1:end]).any():
        raise StoreError("labels are not the tokens shifted by one")
    input_ids, loss_mask, _ = checked_tokens(
        np.append(tokens[:end], labels[end - 1]), np.append(0, mask[:end]), spec.vocab_size
    )
    logsumexp = list_in(record, "log_sum_exp_logits", "iuf", 1, length)[answers, None]
    logits = _teacher_rows(record, "topk_logits", "iuf", answers, length, spec.top_k)
    ids = _teacher_rows(record, "topk_token_ids", "iu", answers, length, spec.top_k)
    if ids.shape != logits.shape:
        raise StoreError(
            f"topk_token_ids has {ids.shape[1]} values per token, but topk_logits {logits.shape[1]}"
        )
    absent = np.isfinite(logsumexp) & (logits - logsumexp <= ABSENT_LOG_PROBABILITY / 2)
    ids, logits = np.where(absent, ABSENT_ID, ids), np.where(absent, -np.inf, logits)
    ids, logits, found = without_padding(ids, logits, logsumexp, spec.vocab_size)
    width = width_of(ids)
    ids, logits = ids[:, : spec.top_k], logits[:, : spec.top_k]
    sample = Sample(row, input_ids, loss_mask, TopK(ids=ids, logits=logits, logsumexp=logsumexp))
    topk = checked_topk(sample, len(answers), spec)
    for fault in deep_faults(topk, spec):
        raise StoreError(f"answer token {fault.token}, column {fault.column}: {fault.what}")
    padding.add(found)
    return replace(sample, topk=topk), width


def _teacher_rows(
    record: dict[str, Any], key: str, kinds: str, answers: NDArray[Any], length: int, top_k: int
) -> NDArray[Any]:
    """Return the answer tokens' rows [A, >= K] of the list of S - 1 rows under `key`."""
    values = list_in(record, key, kinds, 2, length)
    if values.shape[1] < top_k:
        raise StoreError(
            f"{key} has {values.shape[1]} values per token, but top_k is {top_k}; lower it to "
            f"{values.shape[1]}"
        )
    rows: NDArray[Any] = values[answers]
    return rows
