"""A store as one Parquet file, a row per sample, and back without loss.

    row            int64                  row number in the source
    input_ids      list<int32>       [S]
    loss_mask      list<int8>        [S]  1 for answer tokens, else 0
    topk_ids       list<list<int32>>      the ids of each of the A answer tokens, int64 for a
                                          vocabulary above 2^31
    topk_logprobs  list<list<float>>      their log-probabilities at temperature 1, descending
    logsumexp      list<list<float>> [A, T]  at the store's temperatures
    encoded_*      binary                 the arrays of the store's profile, bit for bit

The file's metadata has the store's spec (`nemo_kd.spec`). Read back, a sample is taken from its
`encoded_` columns as long as they decode to the others; without them, or if those have changed, it
is encoded anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_kd.errors import StoreError
from nemo_kd.files import canonical_json, decode_json
from nemo_kd.outputs import install, refuse_directory, work_beside
from nemo_kd.store.checks import checked_tokens, checked_topk, deep_faults
from nemo_kd.store.codecs import Sampled, codec_of
from nemo_kd.store.codecs.base import Arrays, check_entries
from nemo_kd.store.reader import Store
from nemo_kd.store.sample import EncodedSample, Sample, Tokens
from nemo_kd.store.shard import Encoded
from nemo_kd.store.spec import StoreSpec
from nemo_kd.store.tools.arrow import arrow, columns_of, lists_of, numbers_of, opened, rows_of
from nemo_kd.store.tools.padding import width_of
from nemo_kd.store.tools.selection import same_encoding
from nemo_kd.topk import ABSENT_ID, TopK, t1_index

SPEC = b"nemo_kd.spec"
ENCODED = "encoded_"
COLUMNS = ("row", "input_ids", "loss_mask", "topk_ids", "topk_logprobs")
BATCH = 64  # rows that are decoded at a time
GROUP_BYTES = 1 << 25
"""Approximate bytes of the encoded samples of a row group."""


def write_parquet(
    path: str | Path, store: Store, progress: Callable[[int], None] | None = None
) -> int:
    """Write all samples of a store; return their number.

    The file appears at `path`, or replaces the one there, once it is complete.
    `progress(samples)` is called after each row group.
    """
    pa, target = arrow(), Path(path)
    refuse_directory(target)
    schema, done = _schema(store.spec), 0
    with work_beside(target) as work:
        new = work / target.name
        with pa.parquet.ParquetWriter(new, schema, compression="zstd") as writer:
            for group in _groups(store):
                writer.write_table(_table(group, store, schema))
                done += len(group)
                if progress is not None:
                    progress(done)
        install(new, target)
    return done


def spec_of(path: str | Path) -> StoreSpec | None:
    """Return the spec that a file records; None if it has none.

    Raises StoreError if the file is no Parquet, lacks a column, or has an invalid spec.
    """
    with opened(path) as file:
        missing = [name for name in COLUMNS if name not in file.schema_arrow.names]
        if missing:
            raise StoreError(
                f"{path} has no column {missing[0]!r}; expected {', '.join(COLUMNS)}, but it has "
                f"{', '.join(map(str, file.schema_arrow.names[:20]))}"
            )
        recorded = (file.schema_arrow.metadata or {}).get(SPEC)
    if recorded is None:
        return None
    try:
        return StoreSpec.from_json(decode_json(recorded))
    except ValueError as error:
        raise StoreError(f"{path}: its store's spec is damaged: {error}") from error


def widest(path: str | Path) -> int:
    """Return the largest number of ids of an answer token in the first row group."""
    with opened(path) as file:
        if not file.num_row_groups:
            return 0
        column = file.read_row_group(0, columns=["topk_ids"]).column(0)
        counts = column.combine_chunks().flatten().value_lengths().drop_null()
        return int(arrow().compute.max(counts).as_py() or 0)


def read_parquet(
    path: str | Path, spec: StoreSpec, widths: Counter[int] | None = None
) -> Iterator[Sample | EncodedSample]:
    """Yield the samples of a file, cut to the first `spec.top_k` ids.

    `widths` counts the samples by the largest number of ids that a token of theirs has in the file.
    Raises StoreError, naming file and row, for a row that is not a sample.
    """
    recorded = spec_of(path)
    own = recorded is not None and same_encoding(recorded, spec)
    columns = columns_of(path)
    names = [f"{ENCODED}{name}" for name in codec_of(spec).dtypes]
    names = names if own and set(names) <= set(columns) else []
    known = [*COLUMNS, *(["logsumexp"] if "logsumexp" in columns else [])]
    last = -1
    for number, values in enumerate(rows_of(path, [*known, *names], BATCH)):
        try:
            sample, width = _sample(values, spec, names)
            if sample.row <= last:
                raise StoreError(f"row {sample.row} after {last}: sort the file by its column row")
            last = sample.row
            if widths is not None:
                widths[width] += 1
            yield sample
        except (AttributeError, StoreError, TypeError, ValueError) as error:
            raise StoreError(f"{path}, row {number}: {error}") from error


def _schema(spec: StoreSpec) -> Any:
    pa = arrow()
    ids = pa.int32() if spec.vocab_size <= 1 << 31 else pa.int64()
    rows = pa.list_(pa.list_(pa.float32()))
    fields = [
        ("row", pa.int64()),
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.int8())),
        ("topk_ids", pa.list_(pa.list_(ids))),
        ("topk_logprobs", rows),
        ("logsumexp", rows),
        *((f"{ENCODED}{name}", pa.binary()) for name in codec_of(spec).dtypes),
    ]
    return pa.schema(fields, metadata={SPEC: canonical_json(spec.to_json()).encode()})


def _groups(store: Store) -> Iterator[list[Encoded]]:
    group, octets = list[Encoded](), 0
    for index in range(len(store)):
        tokens, arrays = store.encoded(index)
        group.append((tokens, arrays))
        octets += 5 * tokens.input_ids.size + sum(array.nbytes for array in arrays.values())
        if octets >= GROUP_BYTES:
            yield group
            group, octets = [], 0
    if group:
        yield group


def _table(group: list[Encoded], store: Store, schema: Any) -> Any:
    """Return a row group; nested lists are made of flat arrays, not of Python objects."""
    pa, spec = arrow(), store.spec
    topks = [_decoded(store, tokens, arrays) for tokens, arrays in group]
    present = [topk.ids != ABSENT_ID for topk in topks]
    answers = np.array([len(topk.ids) for topk in topks])
    kept = np.concatenate([one.sum(1) for one in present])
    ids = np.concatenate([topk.ids[one] for topk, one in zip(topks, present, strict=True)])
    logprobs = [logprobs_of(topk)[one] for topk, one in zip(topks, present, strict=True)]
    width = np.full(len(kept), len(spec.temperatures))
    lengths = np.array([tokens.input_ids.size for tokens, _ in group])
    flat = {
        "input_ids": (np.concatenate([tokens.input_ids for tokens, _ in group]), [lengths]),
        "loss_mask": (np.concatenate([tokens.loss_mask for tokens, _ in group]), [lengths]),
        "topk_ids": (ids, [kept, answers]),
        "topk_logprobs": (np.concatenate(logprobs), [kept, answers]),
        "logsumexp": (np.concatenate([topk.logsumexp.ravel() for topk in topks]), [width, answers]),
    }
    columns: list[Any] = [pa.array([tokens.row for tokens, _ in group], pa.int64())]
    for name, (values, levels) in flat.items():
        columns.append(_nested(values, levels, schema.field(name).type))
    for name in store.codec.dtypes:
        columns.append(pa.array([arrays[name].tobytes() for _, arrays in group], pa.binary()))
    return pa.Table.from_arrays(columns, schema=schema)


def _decoded(store: Store, tokens: Tokens, arrays: Arrays) -> TopK:
    try:
        return store.codec.decode(arrays, tokens.answers)
    except ValueError as error:
        raise StoreError(f"{store.directory}: row {tokens.row} is damaged: {error}") from error


def _nested(values: NDArray[Any], lengths: list[NDArray[np.int64]], kind: Any) -> Any:
    """Return an Arrow list of values; `lengths` are those of the innermost lists first."""
    pa, inner = arrow(), kind
    while pa.types.is_list(inner):
        inner = inner.value_type
    array = pa.array(values, inner)
    for each in lengths:
        offsets = np.concatenate([[0], each.cumsum()]).astype(np.int32)
        array = pa.ListArray.from_arrays(pa.array(offsets), array)
    return array


def _sample(
    values: dict[str, Any], spec: StoreSpec, names: list[str]
) -> tuple[Sample | EncodedSample, int]:
    """Return a row as a sample, and the largest number of ids that a token of it has.

    The sample is encoded if its `encoded_` columns `names` decode to the others.
    """
    row = values["row"].as_py()
    if type(row) is not int or row < 0:
        raise StoreError(f"row is {row!r:.40}: expected a number of at least 0")
    input_ids, mask = (numbers_of(values[name], name) for name in ("input_ids", "loss_mask"))
    if input_ids.shape != mask.shape or not ((mask == 0) | (mask == 1)).all():
        raise StoreError(f"{input_ids.size} input_ids, {mask.size} values of 0 or 1 in loss_mask")
    ids, loss_mask, _ = checked_tokens(_integers(input_ids, "input_ids"), mask, spec.vocab_size)
    tokens = Tokens(row, ids, loss_mask)
    read = _Read.of(values, tokens.answers, spec)
    sample = Sample(row, tokens.input_ids, tokens.loss_mask, read.topk(spec))
    width = width_of(read.ids)
    topk = checked_topk(sample, tokens.answers, spec)
    for fault in deep_faults(topk, spec):
        raise StoreError(f"answer token {fault.token}, column {fault.column}: {fault.what}")
    arrays = _encoded(values, spec, names)
    if arrays is None or not read.is_of(arrays, spec):
        return replace(sample, topk=topk), width
    return EncodedSample(row, tokens.input_ids, tokens.loss_mask, arrays), width


def _integers(found: NDArray[Any], name: str) -> NDArray[Any]:
    """Return numbers as integers; raise StoreError where that would change one."""
    if found.dtype.kind == "i":
        return found
    with np.errstate(invalid="ignore"):
        integers = found.astype(np.int64)
    changed = integers != found
    if changed.any():
        raise StoreError(f"{name} has {found[changed][0]}: expected integers")
    return integers


@dataclass(frozen=True)
class _Read:
    """The teacher's columns of a row as matrices: ids and log-probabilities [A, n], n >= K."""

    ids: NDArray[np.int64]
    logprobs: NDArray[np.float32]
    logsumexp: NDArray[np.float32]

    @classmethod
    def of(cls, values: dict[str, Any], answers: int, spec: StoreSpec) -> _Read:
        flat_ids, counts = lists_of(values["topk_ids"], "topk_ids")
        flat, same = lists_of(values["topk_logprobs"], "topk_logprobs")
        if len(counts) != answers or not np.array_equal(counts, same):
            raise StoreError(
                f"{answers} answer tokens, but topk_ids has {len(counts)} lists and topk_logprobs "
                f"{len(same)}, or their lengths differ"
            )
        width = max(int(counts.max(initial=0)), spec.top_k)
        check_entries(answers, width)
        chosen = np.arange(width) < counts[:, None]
        ids = np.full(chosen.shape, ABSENT_ID, np.int64)
        logprobs = np.full(chosen.shape, -np.inf, np.float32)
        ids[chosen], logprobs[chosen] = _integers(flat_ids, "topk_ids"), flat
        return cls(ids, logprobs, _logsumexp(values, answers, spec))

    def is_of(self, arrays: Arrays, spec: StoreSpec) -> bool:
        """Return whether encoded arrays decode to these columns."""
        try:
            with np.errstate(all="ignore"):
                stored = codec_of(spec).decode(arrays, len(self.ids))
        except ValueError:
            return False
        return (
            np.array_equal(stored.ids, self.ids)
            and np.array_equal(logprobs_of(stored), self.logprobs)
            and np.array_equal(stored.logsumexp, self.logsumexp)
        )

    def topk(self, spec: StoreSpec) -> TopK:
        """Return the first K entries."""
        at_t1 = self.logsumexp[:, t1_index(spec.temperatures), None]
        return TopK(
            ids=self.ids[:, : spec.top_k],
            logits=(self.logprobs + at_t1)[:, : spec.top_k],
            logsumexp=self.logsumexp,
            temperatures=spec.temperatures,
            draws=spec.profile == Sampled.name,
        )


def logprobs_of(topk: TopK) -> NDArray[np.float32]:
    """Return the log-probabilities [A, K] at temperature 1; -inf for absent entries."""
    at_t1 = topk.logsumexp[:, t1_index(topk.temperatures), None]
    logprobs: NDArray[np.float32] = topk.logits - at_t1
    return logprobs


def _logsumexp(values: dict[str, Any], answers: int, spec: StoreSpec) -> NDArray[np.float32]:
    temperatures = len(spec.temperatures)
    if "logsumexp" not in values or not values["logsumexp"].is_valid:
        if spec.temperatures != (1.0,):
            raise StoreError("no logsumexp: it is needed at temperatures other than 1")
        return np.zeros((answers, 1), np.float32)  # that of log-probabilities
    found, widths = lists_of(values["logsumexp"], "logsumexp")
    if len(widths) != answers or (widths != temperatures).any():
        raise StoreError(f"logsumexp does not have {answers} lists of {temperatures}")
    return found.astype(np.float32).reshape(answers, temperatures)


def _encoded(values: dict[str, Any], spec: StoreSpec, names: list[str]) -> Arrays | None:
    """Return the arrays of the profile; None if the row has none."""
    if not names or any(not values[name].is_valid for name in names):
        return None
    arrays: Arrays = {}
    for name, dtype in codec_of(spec).dtypes.items():
        octets = values[f"{ENCODED}{name}"].as_py()
        if len(octets) % np.dtype(dtype).itemsize:
            return None
        arrays[name] = np.frombuffer(octets, dtype)
    return arrays
