"""Files that are either whole or absent: write to a temporary name, fsync, rename.

A rename within a directory is atomic on POSIX file systems; the fsync before it puts the bytes on
disk first, and the fsync of the directory after it makes the new name survive a power cut.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_kd.errors import StoreError

_BLOCK = 1 << 20


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def size_of(path: str | Path) -> int | None:
    """Bytes of a file, None where there is none."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def fsync(path: Path) -> None:
    """Put a file's bytes, or a directory's names, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def full_disk_explained(directory: Path) -> Iterator[None]:
    """A write that finds no space left, or a quota reached, is an error that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StoreError(
            f"{directory}: {error.strerror}; what is whole stays as it is: free some space and "
            "give the same command again, it goes on from there"
        ) from error


def publish(path: Path, text: str) -> None:
    """Write `text` so that `path` holds all of it or what was there before."""
    with full_disk_explained(path.parent):
        # A name of its own: two hosts may write the same text at once.
        descriptor, temporary = tempfile.mkstemp(
            prefix=f".{path.name}.", suffix=".tmp", dir=path.parent
        )
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fchmod(file.fileno(), 0o666 & ~_umask())
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        fsync(path.parent)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no NaN. What is hashed is this text."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, indent=1) + "\n"


def sha256_of_json(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def read_json(path: Path) -> Any:
    """The value in a JSON file; StoreError when it cannot be read as one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: not readable as JSON ({error}); restore the file") from error
