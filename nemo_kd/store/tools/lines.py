"""Read the lines of other programs' caches: JSON objects, and the lists of numbers in them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_kd.errors import StoreError
from nemo_kd.json_rows import RepeatedKeyError, parsed

MAX_LINE = 256 << 20
"""Bytes of a line: a sample of 32,768 tokens with 100 ids each has 50 MB."""
MAX_LISTS = 1 << 22  # in a line; each token has two
ROWS_PER_LINE, FREE_ROWS = 1000, 100_000
"""An index above `ROWS_PER_LINE * lines + FREE_ROWS` is taken for a time stamp or another id."""


def skip_or_raise(
    bad: StoreError, cause: Exception, on_bad: Callable[[StoreError], None] | None
) -> None:
    """Pass the error of a bad line or row to `on_bad`, which leaves it out; raise it if None."""
    if on_bad is None:
        raise bad from cause
    on_bad(bad)


def check_ascending(row: int, last: int, lines: int) -> None:
    """Raise StoreError for a row not above the `last`, or far above the number of `lines` so far.

    A row far beyond would leave nearly all rows of the store empty.
    """
    if row <= last:
        raise StoreError(
            f"index {row} after {last}: rows must ascend; sort the lines, "
            "or number rows by line with renumber=true"
        )
    if row > ROWS_PER_LINE * (lines + 1) + FREE_ROWS:
        raise StoreError(
            f"index {row} is far larger than the number of lines so far, {lines + 1}, as if it "
            "were no row number; number rows by line with renumber=true"
        )


def lines_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line) for each non-blank line; raise StoreError if one is huge."""
    try:
        with path.open("rb") as file:
            for number in count(1):
                line = file.readline(MAX_LINE + 1)
                if not line:
                    return
                if len(line) > MAX_LINE:
                    raise StoreError(f"{path}, line {number}: more than {MAX_LINE} bytes")
                if line.strip():
                    yield number, line
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error})") from error


def record_of(line: bytes) -> dict[str, Any]:
    """Parse a line; raise StoreError if it is not a JSON object, or has millions of lists."""
    if line.count(b"[") + line.count(b"{") > MAX_LISTS:
        raise StoreError(f"more than {MAX_LISTS} lists; give each sample a line of its own")
    try:
        record = parsed(line.decode(json.detect_encoding(line), "surrogatepass"))
    except RepeatedKeyError as error:
        raise StoreError(f"{error}; remove one of its values") from error
    except (ValueError, RecursionError) as error:
        raise StoreError(f"not JSON ({error})") from error
    if not isinstance(record, dict):
        raise StoreError(f"expected a JSON object, not a {type(record).__name__}")
    return record


def list_in(
    record: dict[str, Any], key: str, kinds: str, dimensions: int, length: int | None = None
) -> NDArray[Any]:
    """Return the list under `key` as an array whose dtype is one of numpy's `kinds`."""
    given = record[key]
    if not _is_list_of_numbers(given, dimensions):
        raise StoreError(_not_numbers(key, kinds, dimensions))
    try:
        values = np.asarray(given)
    except (ValueError, OverflowError) as error:
        raise StoreError(f"{key}: its lists have different lengths") from error
    if values.ndim != dimensions or (values.dtype.kind not in kinds and values.size):
        raise StoreError(_not_numbers(key, kinds, dimensions))
    if length is not None and len(values) != length:
        raise StoreError(f"{key} has {len(values)} rows for {length} tokens")
    return values


def _is_list_of_numbers(values: Any, dimensions: int) -> bool:
    """Check types before numpy converts: of texts it would make an array of the longest's width."""
    if not isinstance(values, list):
        return False
    if dimensions > 1:
        return all(_is_list_of_numbers(row, dimensions - 1) for row in values)
    return set(map(type, values)) <= {bool, int, float}


def _not_numbers(key: str, kinds: str, dimensions: int) -> str:
    shape = "a list" if dimensions == 1 else "a list of lists of the same length"
    return f"{key} must be {shape} of numbers ({_KINDS[kinds]})"


_KINDS = {
    "iu": "integers",
    "iufb": "0 and 1",
    "iuf": "real",
}
