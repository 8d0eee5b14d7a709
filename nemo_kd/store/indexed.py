"""Megatron's indexed data set in pure numpy: a `.bin/.idx` pair that holds one array per sample.

    x.bin    the n arrays, concatenated
    x.idx    9s  b"MMIDIDX\\0\\0"      u64  version 1        u8   code of the dtype
             u64 n, arrays            u64  n + 1, document boundaries
             i32 [n] array lengths    i64 [n] byte offsets in x.bin      i64 [n + 1] 0 ... n

All numbers are little-endian. `megatron.core.datasets.indexed_dataset` reads and writes the same
bytes, with each array as a document.
"""

from __future__ import annotations

import mmap
import os
import struct
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


class FieldWriter:
    """Writer that appends one array per sample to `<prefix>.bin`; `close` writes `<prefix>.idx`."""

    def __init__(self, prefix: Path, dtype: type[np.generic]) -> None:
        self.prefix = prefix
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._lengths: list[int] = []
        self._file = open(f"{prefix}.bin", "wb")  # noqa: SIM115 (closed by `close`)

    def add(self, values: NDArray[Any]) -> None:
        self._file.write(values.astype(self._dtype, copy=False).tobytes())
        self._lengths.append(values.size)

    def close(self) -> None:
        self.abandon()
        lengths = np.array(self._lengths, "<i4")
        offsets = (lengths.cumsum(dtype="<i8") - lengths) * self._dtype.itemsize
        with open(f"{self.prefix}.idx", "wb") as file:
            file.write(_header(self._dtype, len(lengths)))
            for part in (lengths, offsets, np.arange(len(lengths) + 1, dtype="<i8")):
                file.write(part.tobytes())

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
        index = _mapped(Path(f"{prefix}.idx"))
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
        octets = _mapped(Path(f"{prefix}.bin"))
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


def _is_index(index: NDArray[np.uint8], head: bytes, documents: int, samples: int) -> bool:
    """Return whether an index begins with `head` and ends with the boundaries 0 ... samples."""
    boundaries = np.arange(samples + 1, dtype="<i8").tobytes()
    return index[: len(head)].tobytes() == head and index[documents:].tobytes() == boundaries


def _mapped(path: Path) -> NDArray[np.uint8]:
    """Memory-map a file and return its bytes, read-only."""
    with open_regular(path) as file:
        if not os.fstat(file.fileno()).st_size:  # an empty file cannot be mapped
            return np.zeros(0, np.uint8)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
