"""The files of a shard, each with one item per sample, and the per-sample checksums.

tokens     int32   [S]       input_ids
loss_mask  uint8   [S]       loss_mask
rows       int64   [3]       row, checksum of the tokens, seal of the teacher's arrays
...                          the profile's own files
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_kd.store.codecs import Codec

SAMPLE_FIELDS: dict[str, type[np.generic]] = {
    "tokens": np.int32,
    "loss_mask": np.uint8,
    "rows": np.int64,
}
ROW_ITEM = 3  # values in an item of `rows`
_ODD = 0x9E3779B97F4A7C15  # 2^64 / golden ratio; odd, so each row number changes the seal


def field_dtypes(codec: Codec) -> dict[str, type[np.generic]]:
    """Return the dtype of each field of a shard, by file name without `.bin` or `.idx`."""
    return {**SAMPLE_FIELDS, **codec.dtypes}


def file_names(codec: Codec) -> list[str]:
    return sorted(f"{name}.{end}" for name in field_dtypes(codec) for end in ("bin", "idx"))


def token_checksum(input_ids: NDArray[np.int32], loss_mask: NDArray[np.uint8]) -> int:
    """CRC-32 of the token bytes followed by the mask bytes, the same in every profile."""
    return zlib.crc32(loss_mask.data, zlib.crc32(input_ids.data))


def word_sums(arrays: Iterable[NDArray[Any]]) -> list[int]:
    """The sum mod 2^16 of each array's 16-bit words.

    It detects any change within one word and all but 1 in 65,536 changes of several, but not
    swapped words; the SHA-256 in `verify` detects those. Unlike SHA-256 and CRC-32 it is cheap
    enough to check whenever a sample is read.
    """
    return [_word_sum(array) for array in arrays]


def seal(row: int, sums: list[int]) -> int:
    """Combine word sums and row number in an int64: `sum_j sums[j] 2^16j + row * ODD mod 2^64`."""
    packed = sum(value << (16 * i) for i, value in enumerate(sums)) + row * _ODD
    packed %= 1 << 64
    return packed - (1 << 64) if packed >> 63 else packed


def unseal(row: int, sealed: int, fields: int) -> list[int]:
    """Recover the word sums passed to `seal`; they identify the damaged field."""
    packed = (sealed - row * _ODD) % (1 << 64)
    return [packed >> (16 * i) & 0xFFFF for i in range(fields)]


def seals(
    rows: NDArray[np.int64], fields: Iterable[tuple[NDArray[Any], NDArray[np.int32]]]
) -> NDArray[np.int64]:
    """Compute the seals of consecutive samples from their rows and each field's values and lengths.

    The same as `seal(row, word_sums(...))` for each sample.
    """
    packed = rows.astype(np.uint64) * np.uint64(_ODD)
    for i, (values, lengths) in enumerate(fields):
        packed += _word_sums(values, lengths).astype(np.uint64) << np.uint64(16 * i)
    return packed.view(np.int64)


def _word_sums(values: NDArray[Any], lengths: NDArray[np.int32]) -> NDArray[np.uint16]:
    """The sum mod 2^16 of the 16-bit words of each of several concatenated arrays."""
    filled = lengths > 0
    ends = lengths[filled].cumsum(dtype=np.int64)
    starts = ends - lengths[filled]
    sums = np.zeros(len(lengths), np.uint16)
    if not len(ends):
        return sums
    if values.itemsize == 1:
        # A byte at an odd place of its sample is the high half of a word; the places in `values`
        # that are odd are its even ones if the sample starts at one.
        even, odd = (_strided_sums(values[i::2], (starts + 1 - i) // 2) for i in range(2))
        swapped = starts % 2 == 1
        low, high = np.where(swapped, odd, even), np.where(swapped, even, odd)
        sums[filled] = low + (high << np.uint16(8))
    else:
        starts = starts * (values.itemsize // 2)
        sums[filled] = np.add.reduceat(values.view(np.uint16), starts, dtype=np.uint16)
    return sums


def _strided_sums(values: NDArray[np.uint8], starts: NDArray[np.int64]) -> NDArray[np.uint16]:
    """The sum mod 2^16 of each stretch of `values`, up to the next start; some may be empty."""
    ends = np.append(starts[1:], values.size)
    sums = np.zeros(len(starts), np.uint16)
    some = starts < ends
    if some.any():
        sums[some] = np.add.reduceat(values, starts[some], dtype=np.uint16)
    return sums


def _word_sum(array: NDArray[Any]) -> int:
    if array.itemsize == 1:  # length and address may be odd
        padded = np.zeros((array.size + 1) // 2, dtype=np.uint16)
        padded.view(np.uint8)[: array.size] = array
        array = padded
    return int(np.add.reduce(array.view(np.uint16), dtype=np.uint16))
