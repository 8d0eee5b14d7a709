"""Rows of a Parquet file as numpy arrays, a few at a time; pyarrow is needed for this only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_kd.errors import StoreError

MAX_GROUP = 1 << 36
"""Largest uncompressed row group that is read, page by page."""
BUFFER = 1 << 20  # bytes of a column that are read ahead


def arrow() -> Any:
    """Import pyarrow; raise StoreError if it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise StoreError(f"Parquet needs pyarrow ({error}): pip install pyarrow") from error
    return pyarrow


@contextmanager
def opened(path: str | Path) -> Iterator[Any]:
    """Yield a pyarrow ParquetFile; pyarrow's errors become StoreErrors."""
    pa = arrow()
    try:
        with pa.parquet.ParquetFile(str(path), buffer_size=BUFFER) as file:
            yield file
    except StoreError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:  # also of its names' encoding
        raise StoreError(f"{path} cannot be read as Parquet: {error}") from error


def columns_of(path: str | Path) -> list[str]:
    """Return the names of a file's columns."""
    with opened(path) as file:
        return [str(name) for name in file.schema_arrow.names]


def rows_of(path: str | Path, columns: Sequence[str], rows: int) -> Iterator[dict[str, Any]]:
    """Yield the values of each row as Arrow scalars, decoding `rows` of them at a time."""
    with opened(path) as file:
        for group in range(file.num_row_groups):
            octets = file.metadata.row_group(group).total_byte_size
            if not 0 <= octets <= MAX_GROUP:
                raise StoreError(
                    f"{path}: row group {group} has {octets} bytes, more than {MAX_GROUP}; write "
                    "smaller row groups"
                )
            for batch in file.iter_batches(rows, row_groups=[group], columns=list(columns)):
                for index in range(batch.num_rows):
                    yield {name: batch.column(name)[index] for name in batch.schema.names}


def numbers_of(value: Any, name: str) -> NDArray[Any]:
    """Return an Arrow list of numbers as an array."""
    if value.is_valid and not hasattr(value, "values"):
        raise StoreError(f"{name} has {value.type}: expected lists")
    if not value.is_valid or value.values.null_count:
        raise StoreError(f"{name} is null, or has a null")
    found: NDArray[Any] = value.values.to_numpy(zero_copy_only=False)
    if found.dtype.kind not in "iuf":
        raise StoreError(f"{name} has {value.values.type}: expected numbers")
    return found


def lists_of(value: Any, name: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return an Arrow list of lists as one array, and the lengths of the lists."""
    if value.is_valid and not hasattr(value, "values"):
        raise StoreError(f"{name} has {value.type}: expected lists")
    if not value.is_valid or value.values.null_count:
        raise StoreError(f"{name} is null, or has a null")
    lists, kinds = value.values, arrow().types
    if kinds.is_fixed_size_list(lists.type):
        lists = lists.cast(arrow().list_(lists.type.value_type))
    if not (kinds.is_list(lists.type) or kinds.is_large_list(lists.type)):
        raise StoreError(f"{name} has {lists.type}: expected a list for each answer token")
    flat = lists.flatten()
    if flat.null_count or flat.to_numpy(zero_copy_only=False).dtype.kind not in "iuf":
        raise StoreError(f"{name} has nulls, or {flat.type}: expected numbers")
    lengths = lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    return flat.to_numpy(zero_copy_only=False), lengths


def table_of(value: Any, name: str) -> NDArray[Any]:
    """Return an Arrow list of lists of the same length as a matrix."""
    flat, lengths = lists_of(value, name)
    if lengths.size and (lengths != lengths[0]).any():
        raise StoreError(f"the lists of {name} have different lengths")
    return flat.reshape(lengths.size, -1) if lengths.size else flat.reshape(0, 0)
