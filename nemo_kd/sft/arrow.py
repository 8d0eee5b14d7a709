"""Rows of Arrow record batches as the plain values that JSON would give.

Text, numbers, truth values, lists and objects are as in JSON. Dates, times and decimal numbers
become text (ISO 8601; digits). Arrow gives every object of a column the same fields and fills the
missing ones with null: within a row's objects null fields are left out, while a row's own null
columns are kept.
"""

from __future__ import annotations

import datetime
import decimal
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from nemo_kd.sft.hashed import RowError

DATES = (datetime.date, datetime.time)  # a datetime is a date


def arrow() -> Any:
    """Return the module `pyarrow` with its parts for files.

    Raises RowError if it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise RowError(
            "Parquet files and directories of `datasets` are read by pyarrow, which is not "
            "installed: pip install pyarrow"
        ) from error
    return pyarrow


class Batches:
    """Random access to the rows of record batches: `batches[i]` is a row as a dict.

    `schema` is the `plain_schema` of the batches.
    """

    def __init__(self, batches: Sequence[Any], schema: Any) -> None:
        self._batches = [batch for batch in batches if batch.num_rows]
        self._ends = list(accumulate(batch.num_rows for batch in self._batches))
        self._schema = schema
        self._is_plain = all(batch.schema.equals(schema) for batch in self._batches[:1])

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Convert a row; raise ValueError if one of its values cannot be."""
        part = bisect_right(self._ends, row)
        batch = self._batches[part]
        batch = batch.slice(row - (self._ends[part] - batch.num_rows), 1)
        try:
            (value,) = (batch if self._is_plain else batch.cast(self._schema)).to_pylist()
        except OverflowError as error:  # a date after the year 9999
            raise ValueError(str(error)) from error
        return {key: _plain(each) for key, each in value.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, DATES):
        return value.isoformat()
    return str(value) if isinstance(value, decimal.Decimal) else value


def plain_schema(schema: Any, path: Path) -> Any:
    """Return a schema with the values of dictionary-encoded and extension types instead of them.

    Raises RowError, naming file and column, for types that JSON cannot hold, and for two columns of
    one name.
    """
    pa, names = arrow(), list(schema.names)
    for name in names:
        if names.count(name) > 1:
            raise RowError(f"{path} has two columns {name!r}; rename or remove one")
    return pa.schema([pa.field(each.name, _type(each.type, each.name, path)) for each in schema])


def _type(kind: Any, name: str, path: Path) -> Any:
    pa = arrow()
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return _type(kind.storage_type, name, path)
    if types.is_dictionary(kind):
        return _type(kind.value_type, name, path)
    if types.is_struct(kind):
        return pa.struct([pa.field(part.name, _type(part.type, name, path)) for part in kind])
    if types.is_large_list(kind):
        return pa.large_list(_type(kind.value_type, name, path))
    if types.is_list(kind) or types.is_fixed_size_list(kind):
        return pa.list_(_type(kind.value_type, name, path))
    if types.is_float16(kind):
        return pa.float32()
    simple = (
        *(types.is_null, types.is_boolean, types.is_integer, types.is_floating, types.is_decimal),
        *(types.is_string, types.is_large_string, types.is_date, types.is_time),
        types.is_timestamp,
    )
    if any(check(kind) for check in simple):
        return kind
    raise RowError(
        f"{path}: the column {name} has type {kind}, which JSON does not have; remove the column, "
        "or convert it to text"
    )
