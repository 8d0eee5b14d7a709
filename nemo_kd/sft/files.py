"""SFT files as sequences of rows, whatever their kind and number.

A file is JSONL, a JSON array, Parquet, or a directory that `datasets` saved; its content tells
which. Several files are one sequence, in the order given.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from nemo_kd.sft.hashed import joint_sha256
from nemo_kd.sft.json_array import JsonArrayFile
from nemo_kd.sft.jsonl import JsonlFile
from nemo_kd.sft.kinds import Kind, kind_of
from nemo_kd.sft.parquet import ParquetFile
from nemo_kd.sft.paths import expanded
from nemo_kd.sft.saved_dataset import SavedDataset

MOST_OPEN = 64
"""Files of a sequence of several that are kept open."""


class RowFile(Protocol):
    """Rows of one file or of several: `file[i]` is the value of row i, as JSON would give it.

    It can be pickled: another process opens the files again.
    """

    path: Path
    """What messages call it."""
    sha256: str

    @property
    def files(self) -> list[dict[str, Any]]:
        """The name, the number of rows and the hash of each file."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Any:
        """Return the value of a row; raise RowError, naming file, row and reason."""

    def where(self, row: int) -> str:
        """Name a row in messages: its file, and its number in that file."""

    def check_unchanged(self) -> None:
        """Raise RowError if the content of a file has changed since it was opened."""

    def close(self) -> None:
        """Close descriptors until the next read."""


CLASSES: dict[Kind, type[JsonlFile] | type[ParquetFile] | type[SavedDataset]] = {
    Kind.JSONL: JsonlFile,
    Kind.JSON: JsonArrayFile,
    Kind.PARQUET: ParquetFile,
    Kind.DATASET: SavedDataset,
}


def open_files(paths: str | Path | Sequence[str | Path]) -> RowFile:
    """Open a file, or several as one sequence; each path may be a glob.

    The files of a glob are sorted by name. Raises RowError for a path or glob without a file, a
    file that is given twice, and for what is not an SFT file.
    """
    found = expanded(paths)
    if len(found) == 1:
        return _open(found[0])
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    name = given[0] if len(given) == 1 else f"{found[0]} and {len(found) - 1} more"
    parts = []
    for path in found:
        parts.append(_open(path))
        parts[-1].close()
    return SeveralFiles(Path(name), parts)


def _open(path: Path) -> RowFile:
    return CLASSES[kind_of(path)](path)


class SeveralFiles:
    """Several files as one sequence of rows; `sha256` is the hash of their hashes, in order."""

    def __init__(self, path: Path, parts: Sequence[RowFile]) -> None:
        self.path, self.parts = path, list(parts)
        self.sha256 = joint_sha256([part.sha256 for part in parts])
        self._ends = list(accumulate(len(part) for part in parts))
        self._open: dict[int, None] = {}  # the parts read last, the latest at the end

    @property
    def files(self) -> list[dict[str, Any]]:
        """The name, the number of rows and the hash of each file."""
        return [file for part in self.parts for file in part.files]

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, row: int) -> Any:
        """Return the value of a row; raise RowError, naming its file, its number there and why."""
        number, within = self._locate(row)
        self._open.pop(number, None)
        self._open[number] = None
        if len(self._open) > MOST_OPEN:
            oldest = next(iter(self._open))
            del self._open[oldest]
            self.parts[oldest].close()
        return self.parts[number][within]

    def where(self, row: int) -> str:
        """Name a row in messages: its file, and its number in that file."""
        number, within = self._locate(row)
        return self.parts[number].where(within)

    def check_unchanged(self) -> None:
        """Raise RowError if the content of a file has changed since it was opened."""
        for part in self.parts:
            part.check_unchanged()

    def close(self) -> None:
        """Close the descriptors of all files until the next read."""
        self._open.clear()
        for part in self.parts:
            part.close()

    def _locate(self, row: int) -> tuple[int, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} in {self.path}")
        number = bisect_right(self._ends, row)
        return number, row - (self._ends[number] - len(self.parts[number]))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the paths and hashes of the files."""
        return SeveralFiles, (self.path, self.parts)
