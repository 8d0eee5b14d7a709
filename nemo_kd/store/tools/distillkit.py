"""DistillKit's Parquet of captured teacher log-probabilities, a row per sequence.

    input_ids            [S]
    compressed_logprobs  [n] lists of bytes, see `distillkit_codec`   n = S - 1 or S
    bytepacked_indices   [n] lists of bytes
    top_values, token_ids  [n] lists, instead of the two before: log-probabilities and ids, raw
    labels               [S] optional: -100 where a token is not learned
    attention_mask       [S] optional: 0 for padding, else the number of a packed sequence

Entry i predicts token i + 1. Each packed sequence becomes a sample of its own. The sampler appends
a pad token to a sequence for the entry of its last token; as a label it is not learned.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_kd.errors import StoreError
from nemo_kd.store.checks import checked_tokens
from nemo_kd.store.sample import Sample, Tokens
from nemo_kd.store.spec import StoreSpec
from nemo_kd.store.tools.arrow import columns_of, numbers_of, rows_of, table_of
from nemo_kd.store.tools.distillkit_codec import Compression, decoded_ids, decoded_logprobs
from nemo_kd.store.tools.lines import skip_or_raise
from nemo_kd.store.tools.logprobs import Changes, sample_of

CONFIGURATION = "compression_config.yaml"
COMPRESSED, RAW = ("compressed_logprobs", "bytepacked_indices"), ("top_values", "token_ids")
LEGACY = ("packed_indices", "exact_values", "coeffs")
TOKENS = ("input_ids", "labels", "attention_mask")
IGNORED = -100
BATCH = 8  # rows that are decoded at a time


def files_of(path: Path) -> list[Path]:
    """Return a Parquet file, or those of a directory, by the numbers in their names."""
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("*.parquet"), key=lambda one: _natural(one.name))
    if not files:
        raise StoreError(f"{path} has no .parquet files")
    return files


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def is_distillkit(path: Path) -> bool:
    """Return whether a Parquet file has the columns of a capture, in any of its formats."""
    names = set(columns_of(path))
    return any(names.issuperset(each) for each in (COMPRESSED, RAW, LEGACY))


def captured_top_k(path: Path, compression: Compression | None) -> int:
    """Return K: the compression's, or the width of the first raw row."""
    file = files_of(path)[0]
    if _columns(file, compression) == COMPRESSED:
        assert compression is not None
        return compression.k
    for values in rows_of(file, [RAW[1]], BATCH):
        table = table_of(values[RAW[1]], RAW[1])
        if table.size:
            return int(table.shape[1])
    raise StoreError(f"{file} has no rows with {RAW[1]}")


def read_distillkit(
    path: Path,
    spec: StoreSpec,
    compression: Compression | None,
    changes: Changes,
    *,
    pad_id: int | None = None,
    on_bad_row: Callable[[StoreError], None] | None = None,
) -> Iterator[Sample]:
    """Yield the samples of a file or directory, numbered in their order.

    `pad_id`: the tokenizer's pad token. Raises StoreError, naming file and row, for a row that is
    not a capture; with `on_bad_row` it is left out and the error passed to that function.
    """
    number = 0
    for file in files_of(path):
        names, teacher = columns_of(file), _columns(file, compression)
        chosen = [*teacher, *(name for name in TOKENS if name in names)]
        for row, values in enumerate(rows_of(file, chosen, BATCH)):
            try:
                captured = _Captured.of(values, teacher, compression)
                samples = [
                    captured.sample(part, number + i, spec, changes, pad_id)
                    for i, part in enumerate(captured.parts())
                ]
            except StoreError as error:
                bad = StoreError(f"{file}, row {row}: {error}")
                skip_or_raise(bad, error, on_bad_row)
                continue
            number += len(samples)
            yield from samples


def _columns(file: Path, compression: Compression | None) -> tuple[str, str]:
    """Return the names of the teacher's two columns; raise StoreError if they cannot be read."""
    names = set(columns_of(file))
    if "input_ids" not in names:
        raise StoreError(f"{file} has no column input_ids, but {', '.join(sorted(names)[:20])}")
    if names.issuperset(RAW):
        return RAW
    if not names.issuperset(COMPRESSED):
        raise StoreError(
            f"{file} has neither {' and '.join(COMPRESSED)} nor {' and '.join(RAW)}; DistillKit's "
            "older compression (packed_indices, exact_values, coeffs) is not supported: it does "
            "not record the log-sum-exp"
        )
    if compression is None:
        raise StoreError(
            f"{file} is compressed, and does not record how: give the capture's {CONFIGURATION} "
            "with --compression-config"
        )
    return COMPRESSED


@dataclass(frozen=True, eq=False)
class _Captured:
    """A row: S tokens, a mask of learned ones, numbers of packed sequences, and n entries."""

    input_ids: NDArray[np.int64]
    learned: NDArray[np.bool_]
    sequence: NDArray[np.int64]
    values: NDArray[Any]
    ids: NDArray[Any]
    compression: Compression | None
    """None: `values` and `ids` are raw."""

    @classmethod
    def of(
        cls, row: dict[str, Any], columns: tuple[str, str], compression: Compression | None
    ) -> _Captured:
        input_ids = _integers(row["input_ids"], "input_ids")
        ones = np.ones(input_ids.size, np.int64)
        labels = _integers(row["labels"], "labels") if "labels" in row else ones
        mask = (
            _integers(row["attention_mask"], "attention_mask") if "attention_mask" in row else ones
        )
        values, ids = (table_of(row[name], name) for name in columns)
        size = input_ids.size
        if not labels.size == mask.size == size or len(values) != len(ids):
            raise StoreError("its columns have different lengths")
        if not size - 1 <= len(ids) <= size or not size:
            raise StoreError(
                f"{size} tokens, but {len(ids)} entries of the teacher; expected one each, or one "
                "less"
            )
        compressed = compression if columns == COMPRESSED else None
        if compressed and any(t.dtype != np.uint8 and t.size for t in (values, ids)):
            raise StoreError(f"{' and '.join(columns)} must be lists of uint8")
        return cls(input_ids, labels != IGNORED, mask, values, ids, compressed)

    def parts(self) -> list[slice]:
        """Return the packed sequences, without padding."""
        edges = np.flatnonzero(np.diff(self.sequence)) + 1
        bounds = [0, *edges.tolist(), self.input_ids.size]
        return [slice(a, b) for a, b in pairwise(bounds) if self.sequence[a] != 0]

    def sample(
        self, part: slice, number: int, spec: StoreSpec, changes: Changes, pad_id: int | None
    ) -> Sample:
        tokens, mask = self.input_ids[part], self.learned[part].astype(np.int64)
        mask[0] = 0
        appended = len(self.ids) == self.input_ids.size - 1 and part.stop == self.input_ids.size
        if appended and tokens[-1] == pad_id and mask[-1]:
            mask[-1] = 0
            changes.padding_labels += 1
        input_ids, loss_mask, _ = checked_tokens(tokens, mask, spec.vocab_size)
        entries = part.start + np.flatnonzero(mask) - 1
        return sample_of(Tokens(number, input_ids, loss_mask), *self._top(entries), spec, changes)

    def _top(self, entries: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return ids and log-probabilities [A, K] of some of the entries."""
        values, ids = self.values[entries], self.ids[entries]
        if self.compression is None:
            if ids.dtype.kind not in "iu":
                raise StoreError(f"token_ids has {ids.dtype}: expected integers")
            return ids.astype(np.int64), values.astype(np.float32)
        return decoded_ids(ids, self.compression), decoded_logprobs(values, self.compression)


def _integers(value: Any, name: str) -> NDArray[np.int64]:
    found = numbers_of(value, name)
    if found.dtype.kind not in "iu" or (found > np.iinfo(np.int64).max).any():
        raise StoreError(f"{name} has {found.dtype}: expected integers")
    return found.astype(np.int64)
