"""Bit strings: rows of a common layout, with ascending numbers in unary, and fields of any widths.

Bit j of a row is bit j % 8 (counted from the least significant) of byte j // 8; the least
significant bit of a field comes first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

SPARE = 8  # bytes by which a window may extend past the last row
_NARROW = 25  # widest field that fits a window of 4 bytes at any bit offset


def put(bits: NDArray[np.uint8], offset: int, width: int, values: NDArray[Any]) -> None:
    """Write the low `width` bits of `values` [A, n] to `bits` [A, bits], starting at `offset`."""
    rows, count = values.shape
    octets = np.ascontiguousarray(values, dtype="<u8").view(np.uint8).reshape(rows, count, 8)
    used = octets[:, :, : -(-width // 8)]
    fields = np.unpackbits(used, axis=2, bitorder="little")[:, :, :width]
    bits[:, offset : offset + count * width] = fields.reshape(rows, count * width)


def get(
    padded: NDArray[np.uint8], stride: int, offset: int, width: int, count: int
) -> NDArray[Any]:
    """Read the fields written by `put`: [A, count] uint32, or uint64 above 25 bits.

    `padded` holds A rows of `stride` bytes, followed by `SPARE` bytes.
    """
    dtype = np.dtype("<u4" if width <= _NARROW else "<u8")
    rows = (len(padded) - SPARE) // stride
    if width == 8 and offset % 8 == 0:  # byte-aligned: a vocabulary of about 256 K ids
        octets = padded[: rows * stride].reshape(rows, stride)
        return octets[:, offset // 8 : offset // 8 + count].astype(dtype)
    starts = offset + np.arange(count) * width
    # Overlapping windows, one per byte: gathering windows takes a third of the time of bytes.
    windows: NDArray[Any] = np.ndarray((rows, stride), dtype, padded.data, strides=(stride, 1))
    fields = windows[:, starts >> 3]
    fields >>= (starts & 7).astype(dtype)
    fields &= dtype.type((1 << width) - 1)
    return fields


def put_unary(bits: NDArray[np.uint8], offset: int, values: NDArray[np.int64]) -> None:
    """Set bit `offset + i + value` for the i-th of `values` [A, n], ascending in each row."""
    rows, count = values.shape
    positions = values + (offset + np.arange(count))
    positions += np.arange(rows)[:, None] * bits.shape[1]
    bits.reshape(-1)[positions] = 1


def get_unary(rows: NDArray[np.uint8], offset: int, count: int, largest: int) -> NDArray[np.int64]:
    """Read the numbers [A, count], at most `largest`, that `put_unary` wrote to `rows` [A, bytes].

    Raises ValueError if a row does not have `count` bits set.
    """
    first, skip = divmod(offset, 8)
    bits = np.unpackbits(rows[:, first:], axis=1, bitorder="little")
    bits[:, :skip] = 0
    bits[:, skip + count + largest :] = 0
    values = np.flatnonzero(bits.view(np.bool_))
    if values.size != len(rows) * count:
        raise ValueError(f"{values.size} numbers in {len(rows)} rows of {count}")
    values = values.reshape(len(rows), count)
    values -= np.arange(len(rows))[:, None] * bits.shape[1]
    values -= skip + np.arange(count)
    if values.view(np.uint64).max(initial=0) > largest:  # as unsigned, negative values are large
        raise ValueError(f"a row does not have {count} numbers")
    return values


def field_bits(values: NDArray[np.int64], widths: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return the low `widths[i]` bits of each of `values` [n], one after another, as 0 and 1."""
    used = -(-int(widths.max(initial=0)) // 8)
    octets = np.ascontiguousarray(values, "<i8").view(np.uint8).reshape(-1, 8)[:, :used]
    bits = np.unpackbits(octets, axis=1, bitorder="little")
    return bits[np.arange(8 * used) < widths[:, None]]


def read_fields(octets: NDArray[np.uint8], start: int, widths: NDArray[np.int64]) -> NDArray[Any]:
    """Read consecutive fields [n] int64, of at most 56 bits, from bit `start` of packed bits on.

    Raises ValueError unless they end in the last byte of `octets`, with zeros after them.
    """
    ends = start + widths.cumsum()
    end = int(ends[-1]) if len(ends) else start
    if -(-end // 8) != len(octets):
        raise ValueError(f"{len(octets)} bytes for fields that end at bit {end}")
    if end % 8 and octets[-1] >> (end % 8):
        raise ValueError("bits after the last field")
    starts = ends - widths
    padded = np.concatenate([octets, np.zeros(SPARE, np.uint8)])
    windows: NDArray[Any] = np.ndarray((len(octets) + 1,), "<i8", padded.data, strides=(1,))
    return windows[starts >> 3] >> (starts & 7) & ((1 << widths) - 1)
