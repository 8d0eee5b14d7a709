"""Checks of SFT files before they are opened: their paths, kinds and first rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_kd.errors import NemoKDError
from nemo_kd.sft.arrow import Batches, arrow, plain_schema
from nemo_kd.sft.hashed import RowError
from nemo_kd.sft.jsonl import BOM
from nemo_kd.sft.kinds import LINE_BYTES, Kind, kind_of
from nemo_kd.sft.paths import expanded
from nemo_kd.sft.saved_dataset import arrow_files, batches_of


def problem_of(paths: str | Sequence[str]) -> str:
    """Return why paths or globs are no SFT files; "" if they are."""
    try:
        for path in expanded(paths):
            kind_of(path)
    except RowError as error:
        return str(error)
    return ""


def first_rows(paths: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield path and first row of each file that `paths` name."""
    for path in expanded(paths) if paths else ():
        yield str(path), first_row(path)


def first_row(path: Path) -> Any:
    """Return the first row of a file, from the beginning of the file.

    None if it cannot be read from there: opening the file raises the error, if there is one.
    """
    try:
        kind = kind_of(path)
        return (_of_text if kind in (Kind.JSONL, Kind.JSON) else _of_arrow)(path, kind)
    except (NemoKDError, OSError, ValueError, RecursionError, LookupError, StopIteration):
        return None


def _of_text(path: Path, kind: Kind) -> Any:
    with path.open("rb") as file:
        if kind is Kind.JSONL:
            return json.loads(file.readline(LINE_BYTES))
        text = file.read(LINE_BYTES).removeprefix(BOM).decode(errors="ignore").lstrip()
    return json.JSONDecoder().raw_decode(text[1:].lstrip())[0]


def _of_arrow(path: Path, kind: Kind) -> Any:
    if kind is Kind.DATASET:
        data, _ = arrow_files(path)
        schema, batches = batches_of(data[0])
    else:
        with arrow().parquet.ParquetFile(path, buffer_size=LINE_BYTES, pre_buffer=False) as file:
            schema, batches = file.schema_arrow, [next(file.iter_batches(1, use_threads=False))]
    return Batches(batches, plain_schema(schema, path))[0]
