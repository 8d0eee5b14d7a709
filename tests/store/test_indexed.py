"""Our `.bin/.idx` pairs are Megatron's: the same bytes, and each reads the other's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nemo_kd.errors import StoreError
from nemo_kd.store.indexed import DTYPES, FieldReader, FieldWriter

SIZES = {
    "no arrays": (),
    "an empty one": (0,),
    "empty ones among others": (0, 3, 0, 1, 7, 0),
    "odd": (1, 5, 3, 257),
}


def arrays(dtype: str, sizes: tuple[int, ...]) -> list[NDArray[Any]]:
    rng = np.random.default_rng(len(sizes))
    values = [rng.integers(0, 1 << 62, size) for size in sizes]
    return [value.astype(dtype) for value in values]


def write(prefix: Path, dtype: str, parts: list[NDArray[Any]]) -> None:
    writer = FieldWriter(prefix, np.dtype(dtype).type)
    for part in parts:
        writer.add(part)
    writer.close()


@pytest.mark.nemo
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_files_are_megatrons_byte_for_byte(
    tmp_path: Path, dtype: str, sizes: tuple[int, ...]
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    parts = arrays(dtype, sizes)
    write(tmp_path / "ours", dtype, parts)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.dtype(dtype).type)
    for part in parts:
        builder.add_document(part, [part.size])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for end in ("bin", "idx"):
        ours, theirs = tmp_path / f"ours.{end}", tmp_path / f"theirs.{end}"
        assert ours.read_bytes() == theirs.read_bytes()
    reader = FieldReader(tmp_path / "theirs", np.dtype(dtype).type, len(parts))
    # Megatron maps the file, which an empty one does not allow.
    dataset = IndexedDataset(str(tmp_path / "ours"), mmap=any(sizes))
    assert len(dataset) == len(parts)
    for i, part in enumerate(parts):
        assert reader[i].dtype == part.dtype and np.array_equal(reader[i], part)
        assert np.array_equal(dataset[i], part)


def test_what_is_read_cannot_be_written_to(tmp_path: Path) -> None:
    write(tmp_path / "x", "int32", arrays("int32", (3,)))
    with pytest.raises(ValueError, match="read-only"):
        FieldReader(tmp_path / "x", np.int32, 1)[0][0] = 1


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-1],
        lambda data: data[:20],
        lambda data: b"",
        lambda data: data + b"\0",
        lambda data: data[:17] + b"\5" + data[18:],
        lambda data: data[:-8] + b"\7" + data[-7:],
    ],
    ids=["cut off", "half a header", "empty", "longer", "another dtype", "another document"],
)
def test_another_index_is_refused(tmp_path: Path, change: Any) -> None:
    write(tmp_path / "x", "int32", arrays("int32", (3, 1)))
    path = tmp_path / "x.idx"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(StoreError, match=r"x.idx: not the index of 2 int32 arrays"):
        FieldReader(tmp_path / "x", np.int32, 2)


def test_the_index_of_another_number_of_arrays_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "x", "int32", arrays("int32", (3, 1)))
    with pytest.raises(StoreError, match="not the index of 3 int32 arrays"):
        FieldReader(tmp_path / "x", np.int32, 3)
