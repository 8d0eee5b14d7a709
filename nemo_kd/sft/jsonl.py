"""Random access to the rows of a JSONL file, located in the same pass that hashes the file.

Row i is line i, counted from 0. A blank line keeps its number and is an error when read; blank
lines at the end of the file are ignored. No index file is read or written: one that another program
left beside the data may be older than the data.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nemo_kd.errors import NemoKDError

BLOCK = 1 << 24
NEWLINE = 10
BOM = b"\xef\xbb\xbf"
_CLOSED = -1


class RowError(NemoKDError):
    """A file or a row of SFT data that cannot be used."""


class JsonlFile:
    """`file[i]` is the value of line i, `len(file)` the number of lines, `sha256` the file's hash.

    Errors: RowError for a file without rows.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._open()
        self.sha256, self._ends, self._first = _scan(self._descriptor)
        while len(self._ends) and not self.line(len(self._ends) - 1).strip():
            self._ends = self._ends[:-1]
        if not len(self._ends):
            what = "all of its lines are blank" if self._stamp.size else "the file is empty"
            raise RowError(f"{self.path} has no rows: {what}")
        self.check_unchanged()

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: int) -> Any:
        """The row's value, parsed anew each time.

        Errors: RowError that names file, row and reason.
        """
        where, line = f"{self.path}, row {row}", self.line(row)
        if not line.strip():
            raise RowError(f"{where}: not JSON (a blank line); drop the line")
        try:
            return json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise RowError(
                f"{where}: not UTF-8 ({error.reason} at byte {error.start} of the line); save the "
                "file as UTF-8, or drop the line"
            ) from error
        except (ValueError, RecursionError) as error:
            raise RowError(f"{where}: not JSON ({error}); correct or drop the line") from error

    def line(self, row: int) -> bytes:
        """The bytes of a line, without its line feed."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} in {self.path}")
        start = int(self._ends[row - 1]) + 1 if row else self._first
        size = int(self._ends[row]) - start
        line = os.pread(self._descriptor, size, start)
        while len(line) < size:  # more than the system reads at once, or a truncated file
            part = os.pread(self._descriptor, size - len(line), start + len(line))
            if not part:
                raise RowError(self._changed())
            line += part
        return line

    def check_unchanged(self) -> None:
        """Errors: RowError if the file at `path` no longer has the bytes that were hashed.

        Touching the file, or copying the same bytes over it, is not a change.
        """
        try:
            same = _Stamp.of(os.stat(self.path)) == self._stamp
        except OSError as error:
            raise RowError(f"{self._changed()} ({error.strerror})") from error
        if same:
            return
        self._close()
        self._open()
        if _scan(self._descriptor)[0] != self.sha256:
            raise RowError(self._changed())

    def _open(self) -> None:
        self._descriptor = _CLOSED
        if not stat.S_ISREG(os.stat(self.path).st_mode):
            raise RowError(f"{self.path} is not a regular file: rows are read in any order")
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        self._stamp = _Stamp.of(os.fstat(self._descriptor))

    def _close(self) -> None:
        if self._descriptor != _CLOSED:
            os.close(self._descriptor)
            self._descriptor = _CLOSED

    def _changed(self) -> str:
        return (
            f"{self.path} has changed since this run began to read it; run the same command again "
            "once nothing writes to the file"
        )

    def __del__(self) -> None:
        self._close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Open the file again in another process, such as a data loader's."""
        return _reopen, (self.path, self.sha256)


class _Stamp(NamedTuple):
    """What tells apart two states of a file, or two files of one name."""

    device: int
    inode: int
    size: int
    modified: int

    @classmethod
    def of(cls, status: os.stat_result) -> _Stamp:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _reopen(path: Path, sha256: str) -> JsonlFile:
    file = JsonlFile(path)
    if file.sha256 != sha256:
        raise RowError(file._changed())
    return file


def _scan(descriptor: int) -> tuple[str, NDArray[np.int64], int]:
    """(SHA-256 in hex, [lines] the offset of each line's end, the offset of the first line)."""
    digest, offset, first, last = hashlib.sha256(), 0, 0, NEWLINE
    ends = [np.zeros(0, np.int64)]
    while block := os.pread(descriptor, BLOCK, offset):
        digest.update(block)
        if offset == 0 and block.startswith(BOM):
            first = len(BOM)
        ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == NEWLINE) + offset)
        offset, last = offset + len(block), block[-1]
    if last != NEWLINE and offset > first:
        ends.append(np.array([offset]))
    return digest.hexdigest(), np.concatenate(ends), first
