"""A file that is hashed when it is opened, so that a later change of its content is noticed."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from nemo_kd.errors import NemoKDError

BLOCK = 1 << 24
_CLOSED = -1


class RowError(NemoKDError):
    """Error for an SFT file, or a row of one, that cannot be used."""


class DamagedFileError(NemoKDError):
    """Error for a file none of whose rows can be read: they are not dropped as bad rows are."""


class OneFile:
    """What the kinds of SFT files share: names in messages, and pickling."""

    path: Path
    sha256: str

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def files(self) -> list[dict[str, Any]]:
        """The name, the number of rows and the hash of each file: this one's."""
        return [{"name": self.path.name, "rows": len(self), "sha256": self.sha256}]

    def where(self, row: int) -> str:
        """Name a row in messages: file and number."""
        return f"{self.path}, row {row}"

    def check_number(self, row: int) -> None:
        """Raise IndexError for the number of a row that does not exist."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} in {self.path}")

    def close(self) -> None:
        """Close descriptors until the next read."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as path and hash, so that another process, such as a data loader, reopens it."""
        return reopened, (type(self), self.path, self.sha256)


class HashedFile(OneFile):
    """A regular file with the SHA-256 of its content, `sha256`.

    Subclasses locate their rows in `_scan`. Raises RowError if `path` is no regular file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._descriptor = _CLOSED
        self._stamp = self._open()
        self.sha256 = self._scan()
        self.check_unchanged()

    def _scan(self) -> str:
        """Read the file once; return its SHA-256 in hexadecimal digits."""
        return self.read_blocks(lambda block: None)

    def read_blocks(self, see: Callable[[bytes], None]) -> str:
        """Pass the blocks of the file to `see`; return the SHA-256 of them all."""
        digest, offset = hashlib.sha256(), 0
        while block := os.pread(self.descriptor, BLOCK, offset):
            digest.update(block)
            see(block)
            offset += len(block)
        return digest.hexdigest()

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes [start, stop) of the file that was hashed.

        Raises RowError if the file has been changed in place since.
        """
        if _Stamp.of(os.fstat(self.descriptor)) != self._stamp:
            self.check_unchanged()
        data = os.pread(self.descriptor, stop - start, start)
        while len(data) < stop - start:  # a partial read of a long row, or a truncated file
            part = os.pread(self.descriptor, stop - start - len(data), start + len(data))
            if not part:
                raise RowError(changed(self.path))
            data += part
        return data

    def check_unchanged(self) -> None:
        """Raise RowError if the content of the file at `path` has changed since it was hashed.

        Touching the file or overwriting it with the same content does not count as a change.
        """
        try:
            same = _Stamp.of(os.stat(self.path)) == self._stamp
        except OSError as error:
            raise RowError(f"{changed(self.path)} ({error.strerror})") from error
        if same:
            return
        self.close()
        self._stamp = self._open()
        if self.read_blocks(lambda block: None) != self.sha256:
            raise RowError(changed(self.path))

    def close(self) -> None:
        """Close the descriptor; the next read opens the file again and compares it."""
        if self._descriptor != _CLOSED:
            os.close(self._descriptor)
            self._descriptor = _CLOSED

    def _open(self) -> _Stamp:
        if not stat.S_ISREG(os.stat(self.path).st_mode):
            raise RowError(f"{self.path} is not a regular file; copy it to one")
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        return _Stamp.of(os.fstat(self._descriptor))

    @property
    def descriptor(self) -> int:
        """The descriptor of the file that was hashed; it is opened again if it was closed."""
        if self._descriptor == _CLOSED:
            self.check_unchanged()
            if self._descriptor == _CLOSED:
                self._stamp = self._open()
        return self._descriptor

    def __del__(self) -> None:
        self.close()


class _Stamp(NamedTuple):
    """File metadata that changes when a file is modified or replaced."""

    device: int
    inode: int
    size: int
    modified: int

    @classmethod
    def of(cls, status: os.stat_result) -> _Stamp:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class Hashed(Protocol):
    """Something at a path, with the hash of its content."""

    sha256: str


File = TypeVar("File", bound=Hashed)


def reopened(opened: Callable[[Path], File], path: Path, sha256: str) -> File:
    """Open a path again; raise RowError if its content has another hash now."""
    file = opened(path)
    if file.sha256 != sha256:
        raise RowError(changed(path))
    return file


def changed(path: Path) -> str:
    """Return the message for a file whose content has changed."""
    return (
        f"{path} has changed since this run began to read it; run the same command again once "
        "nothing writes to it"
    )


def joint_sha256(parts: Iterable[str]) -> str:
    """Return the hash of several: the SHA-256 of their hexadecimal hashes, in order."""
    return hashlib.sha256("".join(parts).encode()).hexdigest()
