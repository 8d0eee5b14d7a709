"""Check many samples at once: whether all are valid, not what is wrong with one that is not.

`verify` reads a store in stretches of samples. For a stretch that passes here it need not look at
its samples one by one, which takes several times as long.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_kd.errors import StoreError
from nemo_kd.store.checks import deep_faults, topk_faults
from nemo_kd.store.codecs import Codec
from nemo_kd.store.layout import ROW_ITEM, seals
from nemo_kd.store.manifest import ShardInfo
from nemo_kd.store.shard import Shard

STRETCH_BYTES = 1 << 20
"""Approximate bytes of a stretch: small enough that its arrays stay in the processor's cache."""
Stretch = tuple[NDArray[Any], NDArray[np.int32]]


def split(info: ShardInfo, octets: int, samples: range | None = None) -> Iterator[range]:
    """Split samples of a part, by default all, into ranges of about this many bytes."""
    samples = range(info.samples) if samples is None else samples
    total = sum(file.bytes for file in info.files.values())
    size = max(1, info.samples * octets // max(total, 1))
    for start in range(samples.start, samples.stop, size):
        yield range(start, min(start + size, samples.stop))


def counts_if_valid(
    part: Shard, codec: Codec, stretch: range, rows: range, last_row: int
) -> NDArray[np.int64] | None:
    """Check consecutive samples of a part, the first after the source row `last_row`.

    Returns their rows, tokens and answer tokens [3, samples] if they pass every check of `verify`;
    None if one fails, or where the profile's arrays cannot be checked together.
    """
    if not codec.joinable:
        return None
    try:
        fields = part.stretch(stretch.start, stretch.stop)
        return _counts_if_valid(fields, codec, rows, last_row)
    except (StoreError, ValueError):
        return None


def _counts_if_valid(
    fields: dict[str, Stretch], codec: Codec, rows: range, last_row: int
) -> NDArray[np.int64] | None:
    items, item_lengths = fields["rows"]
    if (item_lengths != ROW_ITEM).any():
        return None
    own, checksums, sealed = items.reshape(-1, ROW_ITEM).T
    if own[0] <= last_row or (np.diff(own) <= 0).any():
        return None
    # As Python's integers: numpy's would be compared with each row of the range.
    if int(own[0]) not in rows or int(own[-1]) not in rows:
        return None
    answers = _answers_if_valid(fields, codec.spec.vocab_size, checksums)
    if answers is None or not _teacher_is_valid(fields, codec, answers, own, sealed):
        return None
    return np.stack([own, fields["tokens"][1].astype(np.int64), answers])


def _answers_if_valid(
    fields: dict[str, Stretch], vocab_size: int, checksums: NDArray[np.int64]
) -> NDArray[np.int64] | None:
    """Return the number of answer tokens of each sample if tokens and masks are valid."""
    (tokens, lengths), (mask, mask_lengths) = fields["tokens"], fields["loss_mask"]
    if not np.array_equal(lengths, mask_lengths) or (lengths < 1).any() or (mask > 1).any():
        return None
    if (tokens < 0).any() or (tokens >= vocab_size).any():
        return None
    ends = lengths.cumsum(dtype=np.int64).tolist()
    start = 0
    for end, checksum in zip(ends, checksums.tolist(), strict=True):
        if zlib.crc32(mask[start:end].data, zlib.crc32(tokens[start:end].data)) != checksum:
            return None
        start = end
    starts = np.array([0, *ends[:-1]])
    return np.add.reduceat(mask, starts, dtype=np.int64) - mask[starts]


def _teacher_is_valid(
    fields: dict[str, Stretch],
    codec: Codec,
    answers: NDArray[np.int64],
    rows: NDArray[np.int64],
    sealed: NDArray[np.int64],
) -> bool:
    arrays = {name: fields[name][0] for name in codec.dtypes}
    total = int(answers.sum())
    for name in codec.dtypes:  # each answer token takes as much as another, or it is not checked
        values, lengths = fields[name]
        if (lengths.astype(np.int64) * total != values.size * answers).any():
            return False
    if not np.array_equal(seals(rows, [fields[name] for name in codec.dtypes]), sealed):
        return False
    with np.errstate(all="ignore"):  # damaged values may be arbitrary numbers
        topk = codec.decode(arrays, total)
        return not any(topk_faults(topk, codec.spec)) and not any(deep_faults(topk, codec.spec))
