"""Megatron's indexed data set in pure numpy: a `.bin/.idx` pair that holds one array per sample.

    x.bin    the n arrays, concatenated
    x.idx    9s  b"MMIDIDX\\0\\0"      u64  version 1        u8   code of the dtype
             u64 n, arrays            u64  n + 1, document boundaries
             i32 [n] array lengths    i64 [n] byte offsets in x.bin      i64 [n + 1] 0 ... n

All numbers are little-endian. `megatron.core.datasets.indexed_dataset` reads and writes the same
bytes, with each array as a document.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_kd.errors import StoreError
from nemo_kd.files import open_regular

DTYPES = ("uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16")
"""Names of the dtypes in the order of their codes, which start at 1."""
_HEADER = struct.Struct("<9sQBQQ")


def _header(dtype: np.dtype[Any], samples: int) -> bytes:
    code = DTYPES.index(dtype.name) + 1
    return _HEADER.pack(b"MMIDIDX\0\0", 1, code, samples, samples + 1)


BLOCK = 1 << 23  # bytes that are hashed and written at a time


class FieldWriter:
    """Writer that appends one array per sample to `<prefix>.bin`; `close` writes `<prefix>.idx`."""

    def __init__(self, prefix: Path, dtype: type[np.generic]) -> None:
        self.prefix = prefix
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._lengths: list[NDArray[np.int32]] = []
        self._hash, self._bytes = hashlib.sha256(), 0
        self._file = open(f"{prefix}.bin", "wb")  # noqa: SIM115 (closed by `close`)

    def add(self, values: NDArray[Any]) -> None:
        """Append the array of one sample."""
        self.extend(values, np.array([values.size], np.int32))

    def extend(self, values: NDArray[Any], lengths: NDArray[np.int32]) -> None:
        """Append the concatenated arrays of several samples, which have these lengths."""
        octets = np.ascontiguousarray(values, self._dtype).view(np.uint8).data
        for start in range(0, len(octets), BLOCK):
            block = octets[start : start + BLOCK]
            self._hash.update(block)
            self._file.write(block)
        self._bytes += len(octets)
        self._lengths.append(lengths)

    def close(self) -> dict[str, tuple[int, str]]:
        """Write the index; return size and SHA-256 of both files by name."""
        self.abandon()
        lengths = np.concatenate([np.zeros(0, "<i4"), *self._lengths]).astype("<i4")
        offsets = (lengths.cumsum(dtype="<i8") - lengths) * self._dtype.itemsize
        documents = np.arange(len(lengths) + 1, dtype="<i8")
        index = _header(self._dtype, len(lengths)) + b"".join(
            part.tobytes() for part in (lengths, offsets, documents)
        )
        Path(f"{self.prefix}.idx").write_bytes(index)
        name = self.prefix.name
        return {
            f"{name}.bin": (self._bytes, self._hash.hexdigest()),
            f"{name}.idx": (len(index), hashlib.sha256(index).hexdigest()),
        }

    def abandon(self) -> None:
        """Close `<prefix>.bin` without an index."""
        self._file.close()


class FieldReader:
    """Reader of one field: `field[i]` is sample i's array, a read-only view of the `.bin` file."""

    descriptors = 2
    """Number of file descriptors a reader holds open: one per memory mapping (.idx and .bin)."""

    def __init__(self, prefix: Path, dtype: type[np.generic], samples: int) -> None:
        self.prefix = prefix
        self._dtype = np.dtype(dtype).newbyteorder("<")
        index = mapped(Path(f"{prefix}.idx"))
        head = _header(self._dtype, samples)
        lengths, offsets, documents, end = (
            len(head) + samples * width for width in (0, 4, 4 + 8, 4 + 8 + 8)
        )  # byte offset of each part of the index
        # Compared first: a store that claims many samples must not ask for memory.
        if index.size != end + 8 or not _is_index(index, head, documents, samples):
            raise StoreError(
                f"{prefix}.idx: not the index of {samples} {self._dtype.name} arrays; it is "
                "damaged, see `nemo-kd verify`"
            )
        self.lengths: NDArray[np.int32] = index[lengths:offsets].view("<i4")
        self._offsets: NDArray[np.int64] = index[offsets:documents].view("<i8")
        octets = mapped(Path(f"{prefix}.bin"))
        # One view of the file: slicing it is cheaper than creating an array per sample.
        whole = octets.size - octets.size % self._dtype.itemsize
        self.values: NDArray[Any] = octets[:whole].view(self._dtype)
        """The concatenated arrays of all samples, as stored in the `.bin` file."""

    def __getitem__(self, index: int) -> NDArray[Any]:
        length, offset = self.lengths.item(index), self._offsets.item(index)
        start, unaligned = divmod(offset, self._dtype.itemsize)
        values = self.values[start : start + length]
        if values.size != length or unaligned or start < 0:
            raise StoreError(
                f"{self.prefix}.idx: sample {index} ({length} values at byte {offset}) does not "
                "lie within the .bin file; it is damaged, see `nemo-kd verify`"
            )
        return values

    def stretch(self, start: int, stop: int) -> tuple[NDArray[Any], NDArray[np.int32]]:
        """Return the concatenated arrays of the samples [start, stop), at least one, and lengths.

        Raises StoreError if they do not follow each other in the `.bin` file.
        """
        lengths, offsets = self.lengths[start:stop], self._offsets[start:stop]
        ends = lengths.cumsum(dtype=np.int64)
        first, unaligned = divmod(int(offsets[0]), self._dtype.itemsize)
        expected = offsets[0] + (ends - lengths) * self._dtype.itemsize
        values = self.values[first : first + int(ends[-1])]
        if unaligned or values.size != ends[-1] or not np.array_equal(offsets, expected):
            raise StoreError(
                f"{self.prefix}.idx: the samples {start} to {stop - 1} do not follow each other "
                "in the .bin file; it is damaged, see `nemo-kd verify`"
            )
        return values, lengths


def _is_index(index: NDArray[np.uint8], head: bytes, documents: int, samples: int) -> bool:
    """Return whether an index begins with `head` and ends with the boundaries 0 ... samples."""
    boundaries = np.arange(samples + 1, dtype="<i8").tobytes()
    return index[: len(head)].tobytes() == head and index[documents:].tobytes() == boundaries


def mapped(path: Path) -> NDArray[np.uint8]:
    """Memory-map a file and return its bytes, read-only."""
    with open_regular(path) as file:
        if not os.fstat(file.fileno()).st_size:  # an empty file cannot be mapped
            return np.zeros(0, np.uint8)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def sequences(path: Path) -> Iterator[NDArray[Any]]:
    """Yield the sequences of any indexed data set of Megatron, given its prefix or a file of it.

    Raises StoreError if it is damaged or not one.
    """
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    try:
        index, octets = (mapped(Path(f"{prefix}.{end}")) for end in ("idx", "bin"))
    except OSError as error:
        raise StoreError(f"{prefix}.idx and .bin cannot be read: {error}") from error
    if index.size < _HEADER.size:
        raise StoreError(f"{prefix}.idx is not the index of a Megatron data set")
    magic, version, code, count, _ = _HEADER.unpack(index[: _HEADER.size].tobytes())
    end = _HEADER.size + 12 * count
    if magic != b"MMIDIDX\0\0" or version != 1 or not 0 < code <= len(DTYPES) or end > index.size:
        raise StoreError(f"{prefix}.idx is not the index of a Megatron data set")
    dtype = np.dtype(DTYPES[code - 1]).newbyteorder("<")
    lengths = index[_HEADER.size : _HEADER.size + 4 * count].view("<i4")
    offsets = index[_HEADER.size + 4 * count : end].view("<i8")
    for number, (length, offset) in enumerate(zip(lengths.tolist(), offsets.tolist(), strict=True)):
        stop = offset + length * dtype.itemsize
        if length < 0 or not 0 <= offset <= stop <= octets.size:
            raise StoreError(f"{prefix}.idx: sequence {number} does not lie within the .bin file")
        yield np.frombuffer(octets[offset:stop].tobytes(), dtype)
