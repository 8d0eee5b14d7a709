"""One array a sample in Megatron's `.bin/.idx` pair, through megatron-core's own classes.

megatron-core is imported when the first file is opened: importing it takes seconds, and on a
machine without CUDA `nemo_kd.nemo.cpu.install()` has to come before it.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_kd.errors import StoreError

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
# numpy dtype → the code in the header, as megatron-core numbers them.
_CODES = {"uint8": 1, "int32": 4, "int64": 5, "float32": 7, "uint16": 8}


def _megatron() -> ModuleType:
    try:
        from megatron.core.datasets import indexed_dataset
    except ImportError as error:
        raise StoreError(
            f"a store's files are read and written by megatron-core, which is missing ({error}); "
            'pip install "megatron-core==0.13.1"'
        ) from error
    return indexed_dataset


class FieldWriter:
    """Appends one array for each sample to `<prefix>.bin`; `close` writes `<prefix>.idx`."""

    def __init__(self, prefix: Path, dtype: type[np.generic]) -> None:
        self.prefix = prefix
        self._builder = _megatron().IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)

    def add(self, values: NDArray[Any]) -> None:
        self._builder.add_document(values, [values.size])

    def close(self) -> None:
        self._builder.finalize(f"{self.prefix}.idx")

    def abandon(self) -> None:
        self._builder.data_file.close()


class FieldReader:
    """`field[i]` is sample i's array, a read-only view into the memory-mapped `<prefix>.bin`."""

    def __init__(self, prefix: Path, dtype: type[np.generic], samples: int) -> None:
        self.prefix = prefix
        self._dtype = np.dtype(dtype)
        _check_index(Path(f"{prefix}.idx"), self._dtype, samples)
        # An empty file cannot be mapped; reading nothing from it works either way.
        mapped = os.path.getsize(f"{prefix}.bin") > 0
        self._dataset = _megatron().IndexedDataset(str(prefix), mmap=mapped)
        self._offsets: NDArray[np.int64] = self._dataset.index.sequence_pointers
        self.lengths: NDArray[np.int32] = self._dataset.index.sequence_lengths
        # One view of the whole file: slicing it costs a tenth of IndexedDataset.__getitem__.
        size = os.path.getsize(f"{prefix}.bin") // self._dtype.itemsize
        self._values: NDArray[Any] = self._dataset.bin_reader.read(self._dtype, size, 0)

    def __getitem__(self, index: int) -> NDArray[Any]:
        length, offset = self.lengths.item(index), self._offsets.item(index)
        start, unaligned = divmod(offset, self._dtype.itemsize)
        values = self._values[start : start + length]
        if values.size != length or unaligned or start < 0:
            raise StoreError(
                f"{self.prefix}.idx: sample {index} ({length} values at byte {offset}) does not "
                "lie within the .bin file; it is damaged, see `nemo-kd verify`"
            )
        return values

    @property
    def values(self) -> NDArray[Any]:
        """All samples' arrays as one: they lie in the file one after the other."""
        return self._values


def _check_index(path: Path, dtype: np.dtype[Any], samples: int) -> None:
    """Refuse an index that is not the one of `samples` arrays of `dtype`, one a document."""
    expected = _HEADER.pack(_MAGIC, 1, _CODES[dtype.name], samples, samples + 1)
    documents = np.arange(samples + 1, dtype="<i8").tobytes()  # Megatron only asserts on these
    size = _HEADER.size + samples * (4 + 8) + len(documents)
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
        file.seek(max(size - len(documents), 0))
        tail = file.read()
    if head != expected or tail != documents:
        raise StoreError(
            f"{path}: not the index of {samples} {dtype.name} arrays; it is damaged, "
            "see `nemo-kd verify`"
        )
