"""Outputs that replace a file or a directory only once they are complete.

A new output is written in a work directory beside its target and renamed at the end, so that a
failure or a kill leaves the target as it was. The work directory's name is the same in each run for
a target: its lock keeps a second process away, and the next run removes what a killed one left.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nemo_kd.errors import FULL, NemoKDError
from nemo_kd.files import (
    MAX_JSON,
    FullDiskError,
    flush,
    fsync,
    full_disk_explained,
    open_regular,
)
from nemo_kd.lock import LOCK, DirectoryLock

SUFFIX = ".nemo-kd-new"
CONTENT = "content"
PREVIOUS = "previous"
"""The old target within the work directory, on file systems that cannot exchange two names."""
RENAME_EXCHANGE = 2
AT_FDCWD = -100


def refuse_inputs(outputs: Iterable[str | Path], inputs: Iterable[str | Path]) -> None:
    """Raise NemoKDError if an output is, holds, or lies in an input, or is given twice.

    Files and directories are compared by device and inode, so that other names of an input, such as
    links and bind mounts, are recognised.
    """
    seen: list[Path] = []
    sources = [(str(path), Path(path).resolve()) for path in inputs]
    for output in outputs:
        target = Path(output).resolve()
        if target in seen:
            raise NemoKDError(f"{output} is given twice; each output needs a path of its own")
        if any(one in target.parents or target in one.parents for one in seen):
            raise NemoKDError(f"{output} holds or lies in another output; give separate paths")
        seen.append(target)
        for name, source in sources:
            _refuse_overlap(str(output), target, name, source)


def _refuse_overlap(output: str, target: Path, name: str, source: Path) -> None:
    above_target, above_source = _identities(target), _identities(source)
    mine, own = above_target.get(target), above_source.get(source)
    if mine is not None and mine == own:
        raise NemoKDError(f"{output} is a source and would be overwritten; give another target")
    if own is not None and own in above_target.values():
        raise NemoKDError(f"{output} lies in the source {name}; give a target outside of it")
    if mine is not None and mine in above_source.values():
        raise NemoKDError(
            f"{output} holds the source {name}, which would be removed with it; give another target"
        )


def _identities(path: Path) -> dict[Path, tuple[int, int]]:
    """Return device and inode of a path and of each of its parents that exist."""
    found = {}
    for one in (path, *path.parents):
        with suppress(FileNotFoundError, NotADirectoryError):
            status = os.stat(one)
            found[one] = status.st_dev, status.st_ino
    return found


def refuse_foreign(path: Path, what: str, is_ours: Callable[[bytes], bool]) -> bool:
    """Raise NemoKDError if the file to write, `path`, exists and is not `what` this program writes.

    `is_ours` takes the first 4 MiB of the existing file. Return whether a file is replaced; an
    empty one, such as `mktemp` makes, holds nothing that could be lost.
    """
    refuse_directory(path)
    if not os.path.lexists(path):
        return False
    content = _beginning(path)
    if content is None or (content and not is_ours(content)):
        raise NemoKDError(
            f"{path} would be replaced, but it is not {what}; move it away, or choose another name"
        )
    return bool(content)


def is_json_with(*keys: str) -> Callable[[bytes], bool]:
    """Return a function for `refuse_foreign`: whether a file is a JSON object with all `keys`."""

    def is_ours(content: bytes) -> bool:
        value = json_object(content)
        return value is not None and set(keys) <= value.keys()

    return is_ours


def json_object(content: bytes) -> dict[str, Any] | None:
    """Return the JSON object that a file's content is; None if it is anything else."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _beginning(path: Path) -> bytes | None:
    """Return the first MAX_JSON bytes of a regular file; None if it cannot be read."""
    try:
        with open_regular(path) as file:
            return file.read(MAX_JSON)
    except OSError:
        return None


def refuse_directory(path: Path) -> None:
    """Raise NemoKDError if `path`, the name of a file to write, is a directory."""
    if path.is_dir():
        raise NemoKDError(f"{path} is a directory; give the path of a file")


@contextmanager
def work_beside(target: Path) -> Iterator[Path]:
    """Yield an empty directory on the file system of `target`; it is removed at the end.

    `target` is a resolved path; missing parents are created. Raises LockedError if another process
    is writing the same target, and NemoKDError on a full disk or if the directory cannot be made.
    """
    work = target.with_name(f".{target.name}{SUFFIX}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        at = next(parent for parent in target.parents if parent.exists())
        why = f"{at}: {_reason(error)}" if at.is_dir() else f"{at} is a file"
        raise NemoKDError(f"{target} cannot be created ({why}); choose another place") from error
    _refuse_foreign(work)
    try:
        with _nothing_changed(target), DirectoryLock(work, shown=target):
            _recover(work, target)
            content = work / CONTENT
            _clear(content)
            content.mkdir()
            try:
                with full_disk_explained(target.parent):
                    yield content
            finally:
                _clear(content)
    finally:
        with suppress(OSError):  # another process may have locked it already
            work.rmdir()


@contextmanager
def _nothing_changed(target: Path) -> Iterator[None]:
    """Say on a full disk what has become of the target."""
    try:
        yield
    except FullDiskError as error:
        cause = error.__cause__
        remedy = FULL[getattr(cause, "errno", None) or errno.ENOSPC]
        raise FullDiskError(
            f"{target}: {_reason(cause)}; nothing was changed: {remedy} and run the same command "
            "again"
        ) from cause


def _reason(error: BaseException | None) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _refuse_foreign(work: Path) -> None:
    """Raise NemoKDError if the work directory was not made by `work_beside`."""
    try:
        status = work.lstat()
    except FileNotFoundError:
        return
    names = [] if stat.S_ISLNK(status.st_mode) else [path.name for path in _entries(work)]
    ours = stat.S_ISDIR(status.st_mode) and all(
        name in (CONTENT, PREVIOUS) or name.startswith(LOCK) for name in names
    )
    if not ours:
        raise NemoKDError(f"{work} was not written by nemo-kd, which needs the name; move it away")


def _entries(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _recover(work: Path, target: Path) -> None:
    """Put back the target of a process that was killed between two renames; drop a replaced one."""
    previous = work / PREVIOUS
    if not os.path.lexists(target) and previous.exists():
        os.rename(previous, target)
    _clear(previous)


def _clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Yield an empty directory that replaces `target` on a clean exit from the context.

    Errors: as `work_beside`.
    """
    with work_beside(target) as work:
        new = work / "new"
        new.mkdir()
        yield new
        install(new, target)


def install(new: Path, target: Path) -> None:
    """Flush `new`, a file or a directory in a work directory of `target`, and rename it to that.

    A directory at `target` trades names with `new` in one step, where the file system can.
    """
    flush(new)
    if target.is_dir() and any(target.iterdir()):
        shutil.copymode(target, new)
        if not _exchange(new, target):
            previous = new.parent.parent / PREVIOUS
            os.rename(target, previous)
            try:
                os.rename(new, target)
            except BaseException:
                os.rename(previous, target)
                raise
            _clear(previous)
    else:
        os.replace(new, target)
    fsync(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names atomically; return False where that is not possible."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    return bool(rename(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0)
