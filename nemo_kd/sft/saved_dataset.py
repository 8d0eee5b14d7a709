"""Random access to the rows of a directory that `datasets.Dataset.save_to_disk` wrote.

Its Arrow files are mapped into memory. Nothing is written beside them, and `datasets` is not
needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_kd.files import read_json
from nemo_kd.sft.arrow import Batches, arrow, plain_schema
from nemo_kd.sft.hashed import (
    DamagedFileError,
    HashedFile,
    OneFile,
    RowError,
    changed,
    joint_sha256,
)

STATE = "state.json"


class SavedDataset(OneFile):
    """The directory `path` as a sequence of rows: `dataset[i]` is row i as a dict.

    `sha256` is the hash of its Arrow files (`joint_sha256`). Raises RowError for a directory
    without rows and for columns that JSON does not have; DamagedFileError.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._data, self._order = arrow_files(self.path)
        self._files = [HashedFile(file) for file in (*self._data, *self._order)]
        self.sha256 = joint_sha256([file.sha256 for file in self._files])
        for file in self._files:
            file.close()
        self._batches = self._opened()
        self._indices = self._read_indices()
        if not len(self):
            raise RowError(f"{self.path} has no rows: the data set is empty")

    def __len__(self) -> int:
        return len(self._batches) if self._indices is None else len(self._indices)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Return a row's value; raise RowError, naming file, row and reason."""
        self.check_number(row)
        try:
            return self._batches[row if self._indices is None else int(self._indices[row])]
        except ValueError as error:
            raise RowError(f"{self.where(row)}: {error}; fix or remove the row") from error

    def check_unchanged(self) -> None:
        """Raise RowError if the content of the Arrow files has changed since it was hashed."""
        if arrow_files(self.path) != (self._data, self._order):
            raise RowError(changed(self.path))
        for file in self._files:
            file.check_unchanged()
            file.close()

    def _opened(self) -> Batches:
        tables = [batches_of(path) for path in self._data]
        schemas = [schema for schema, _ in tables]
        for path, schema in zip(self._data, schemas, strict=True):
            if not schema.equals(schemas[0]):
                raise RowError(f"{path} has other columns than {self._data[0]}: {schema}")
        plain = plain_schema(schemas[0], self.path)
        return Batches([batch for _, batches in tables for batch in batches], plain)

    def _read_indices(self) -> NDArray[np.int64] | None:
        """Return the rows in the order of an index file, which old versions of `datasets` wrote."""
        if not self._order:
            return None
        parts = [batch for path in self._order for batch in batches_of(path)[1]]
        return np.concatenate([batch.column(0).to_numpy().astype(np.int64) for batch in parts])


def arrow_files(directory: Path) -> tuple[list[Path], list[Path]]:
    """Return the files of the rows and those of their order, from `state.json`."""
    state = read_json(directory / STATE)
    try:
        data, order = state["_data_files"], state.get("_indices_data_files") or []
        return [_inside(directory, each) for each in data], [_inside(directory, e) for e in order]
    except (TypeError, KeyError, AttributeError) as error:
        raise RowError(f"{directory / STATE} is not that of a saved data set: {error!r}") from error


def _inside(directory: Path, entry: dict[str, str]) -> Path:
    name = entry["filename"]
    if Path(name).name != name:
        raise RowError(f"{directory / STATE} names {name!r}: expected a file in {directory}")
    if not (directory / name).is_file():
        raise DamagedFileError(f"{directory} is incomplete: {name} is missing; save it again")
    return directory / name


def batches_of(path: Path) -> tuple[Any, Sequence[Any]]:
    """Return the schema and the record batches of an Arrow stream, mapped into memory."""
    pa = arrow()
    try:
        with pa.memory_map(str(path)) as mapped, pa.ipc.open_stream(mapped) as reader:
            return reader.schema, list(reader)
    except (pa.ArrowException, OSError) as error:
        raise DamagedFileError(f"{path} is not a readable Arrow file: {error}") from error
