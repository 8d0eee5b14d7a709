"""Atomic file writes: write under a temporary name, fsync, rename.

A rename within a directory is atomic on POSIX file systems. The fsync before it ensures that the
bytes are on disk, and the fsync of the directory after it that the new name survives a power cut.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

import msgspec

from nemo_kd.errors import FULL, NemoKDError, StoreError

MAX_JSON = 4 << 20
"""Bytes of a JSON file that `read_json` reads."""


class FullDiskError(NemoKDError):
    """No space is left for a file, or for more of it; the cause is the OSError."""


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a file that replaces `path` on a clean exit from the context.

    On an exception the temporary file is removed and `path` is unchanged. Raises FullDiskError
    on a full disk.
    """
    with full_disk_explained(path.parent):
        temporary = temporary_beside(path)
        try:
            yield temporary
            commit(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def temporary_beside(path: Path) -> Path:
    """Create an empty file in the directory of `path` and return its path.

    The name is random, because two hosts may write the same file at the same time. The file is new:
    what lies there already, such as a link that somebody planted, is neither followed nor replaced.
    Unlike `tempfile.mkstemp` it leaves the file's mode to the umask.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    return temporary


def publish(path: Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with published(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def commit(temporary: Path, path: Path) -> None:
    """Flush `temporary`, a file or a directory of files, to disk, then rename it to `path`."""
    flush(temporary)
    os.replace(temporary, path)
    fsync(path.parent)


def flush(path: Path) -> None:
    """Flush a file, or a directory of files, to disk."""
    if path.is_dir():
        for file in path.iterdir():
            fsync(file)
    fsync(path)


def fsync(path: Path) -> None:
    """Flush a file's content, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def full_disk_explained(directory: Path) -> Iterator[None]:
    """Context manager that raises FullDiskError on a full disk, exceeded quota or file size."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise FullDiskError(
            f"{directory}: {error.strerror}; completed files are kept: {FULL[error.errno]} and run "
            "the same command to resume"
        ) from error


def sha256_of(path: Path) -> str:
    """Return the hex SHA-256 of a file's content."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_regular(path: str | Path) -> BufferedReader:
    """Open a regular file for reading; raise OSError for any other kind of file.

    Opening a FIFO or a device would wait or act on it: neither is opened.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    # It may have been replaced in between: O_NONBLOCK opens a FIFO without waiting.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    file = open(descriptor, "rb")  # noqa: SIM115 (the caller closes it)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def read_bounded(path: str | Path, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes; raise OSError for any other.

    The size is compared before anything is read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"{size} bytes where at most {limit} are read", str(path))
        return file.read(limit)


def size_of(path: str | Path) -> int | None:
    """Return the size of a file in bytes; None if no regular file exists at `path`."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def canonical_json(value: Any) -> str:
    """Serialize a value to the unique text that is stored and hashed: sorted keys, no NaN."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, indent=1) + "\n"


def sha256_of_json(value: Any) -> str:
    """Return the hex SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def decode_json(text: bytes | str, kind: Any = Any) -> Any:
    """Decode JSON as msgspec's `kind`; raise ValueError, saying where, for anything else.

    Unlike the standard library it takes no NaN, no lone surrogates and no number out of range.
    """
    try:
        return msgspec.json.decode(text, type=kind)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def read_json(path: Path) -> Any:
    """Read a JSON file of at most MAX_JSON bytes; raise StoreError if it is not one."""
    try:
        return decode_json(read_bounded(path, MAX_JSON))
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: not readable as JSON ({error}); restore the file") from error
