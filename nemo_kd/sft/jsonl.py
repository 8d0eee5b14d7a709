"""Random access to the rows of a JSONL file; the pass that hashes the file also locates its lines.

Row i is line i, counted from 0. A blank line counts as a row and raises an error when read; blank
lines at the end of the file are ignored. No index file is read or written: an index left beside the
data by another program may be out of date.
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
    """Error for an SFT file, or a row of one, that cannot be used."""


class JsonlFile:
    """A JSONL file as a sequence of rows: `file[i]` is the parsed line i.

    `sha256` is the hash of the file. Raises RowError for a file without rows.
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
        """Parse and return a row's value, without caching.

        Raises RowError, naming file, row and reason.
        """
        where, line = f"{self.path}, row {row}", self.line(row)
        if not line.strip():
            raise RowError(f"{where}: not JSON (a blank line); remove the line")
        try:
            return json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise RowError(
                f"{where}: not UTF-8 ({error.reason} at byte {error.start} of the line); save the "
                "file as UTF-8, or remove the line"
            ) from error
        except (ValueError, RecursionError) as error:
            raise RowError(f"{where}: not JSON ({error}); fix or remove the line") from error

    def line(self, row: int) -> bytes:
        """Return the bytes of a line, without the line feed."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} in {self.path}")
        start = int(self._ends[row - 1]) + 1 if row else self._first
        size = int(self._ends[row]) - start
        line = os.pread(self._descriptor, size, start)
        while len(line) < size:  # a partial read of a long line, or a truncated file
            part = os.pread(self._descriptor, size - len(line), start + len(line))
            if not part:
                raise RowError(self._changed())
            line += part
        return line

    def check_unchanged(self) -> None:
        """Raise RowError if the content of the file at `path` has changed since it was hashed.

        Touching the file or overwriting it with the same content does not count as a change.
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
            raise RowError(f"{self.path} is not a regular file; copy it to one")
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
        """Pickle as path and hash, so that another process, such as a data loader, reopens it."""
        return _reopen, (self.path, self.sha256)


class _Stamp(NamedTuple):
    """File metadata that changes when a file is modified or replaced."""

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
    """Return the hex SHA-256, the end offset of each line [lines] and the first line's offset."""
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
