"""Random access to the rows of a JSONL file; the pass that hashes the file also locates its lines.

Row i is line i, counted from 0. A blank line counts as a row and raises an error when read; blank
lines at the end of the file are ignored. No index file is read or written: an index left beside the
data by another program may be out of date.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_kd.json_rows import RepeatedKeyError, parsed
from nemo_kd.sft.hashed import HashedFile, RowError

NEWLINE = 10
BOM = b"\xef\xbb\xbf"


class JsonlFile(HashedFile):
    """A JSONL file as a sequence of rows: `file[i]` is the parsed line i.

    `sha256` is the hash of the file. Raises RowError for a file without rows.
    """

    unit = "line"
    """What a row is called in messages about its bytes."""
    _starts: NDArray[np.int64]  # [rows], the offset of each row's first byte
    _ends: NDArray[np.int64]  # [rows]

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        if not len(self):
            what = f"all of its {self.unit}s are blank" if self._stamp.size else "the file is empty"
            raise RowError(f"{self.path} has no rows: {what}")

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: int) -> Any:
        """Parse and return a row's value, without caching.

        Raises RowError, naming file, row and reason.
        """
        where, line = self.where(row), self.line(row)
        if not line.strip():
            raise RowError(f"{where}: not JSON (a blank line); remove the line")
        try:
            return parsed(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise RowError(
                f"{where}: not UTF-8 ({error.reason} at byte {error.start} of the {self.unit}); "
                f"save the file as UTF-8, or remove the {self.unit}"
            ) from error
        except RepeatedKeyError as error:
            raise RowError(f"{where}: {error}; remove one of its values") from error
        except (ValueError, RecursionError) as error:
            raise RowError(f"{where}: not JSON ({error}); fix or remove the {self.unit}") from error

    def line(self, row: int) -> bytes:
        """Return the bytes of a row, without the line feed."""
        self.check_number(row)
        return self.read(int(self._starts[row]), int(self._ends[row]))

    def _scan(self) -> str:
        lines = _Lines()
        sha256 = self.read_blocks(lines.see)
        self._starts, self._ends = lines.found()
        while len(self._ends) and not self.line(len(self._ends) - 1).strip():
            self._starts, self._ends = self._starts[:-1], self._ends[:-1]
        return sha256


class _Lines:
    """The offsets of the lines in consecutive blocks of a file."""

    def __init__(self) -> None:
        self.ends = [np.zeros(0, np.int64)]
        self.first = self.offset = 0
        self.last = NEWLINE

    def see(self, block: bytes) -> None:
        if self.offset == 0 and block.startswith(BOM):
            self.first = len(BOM)
        newlines = np.flatnonzero(np.frombuffer(block, np.uint8) == NEWLINE)
        self.ends.append(newlines + self.offset)
        self.offset, self.last = self.offset + len(block), block[-1]

    def found(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the start and the end of each line."""
        if self.last != NEWLINE and self.offset > self.first:
            self.ends.append(np.array([self.offset]))
        ends = np.concatenate(self.ends)
        starts = np.concatenate([[self.first], ends[:-1] + 1])[: len(ends)]
        return starts, ends
