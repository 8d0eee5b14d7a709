"""The directory of a new store, which replaces an existing store only once it is complete."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from nemo_kd.errors import StoreError
from nemo_kd.lock import DirectoryLock
from nemo_kd.outputs import install, work_beside
from nemo_kd.store.manifest import MANIFEST
from nemo_kd.store.ours import refuse_foreign


@contextmanager
def new_store(directory: str | Path, overwrite: bool) -> Iterator[Path]:
    """Yield an empty directory for a store; on a clean exit it takes the place of `directory`.

    On an exception, or if the process is killed, `directory` stays as it was. Raises StoreError if
    it holds a store and `overwrite` is false, or anything else in any case; LockedError if another
    process is writing it.
    """
    target = Path(directory).resolve()
    refuse_target(target, overwrite)  # before anything is created
    with ExitStack() as stack:
        work = stack.enter_context(work_beside(target))
        refuse_target(target, overwrite)  # another process may have written it meanwhile
        if target.exists():
            stack.enter_context(DirectoryLock(target))  # a dump may be writing it
        new = work / "store"
        new.mkdir()
        yield new
        refuse_target(target, overwrite)
        try:
            install(new, target)
        except OSError as error:
            raise StoreError(
                f"{target} cannot be replaced ({error.strerror}); it is as it was: choose another "
                "directory"
            ) from error


def refuse_target(target: Path, overwrite: bool) -> None:
    """Raise StoreError if a store must not be written to `target`."""
    if not os.path.lexists(target):
        return
    refuse_foreign(target)
    if os.path.ismount(target):
        raise StoreError(
            f"{target} is a mount point and cannot be replaced; give a directory in it"
        )
    stored = [path.name for path in target.iterdir() if not path.name.startswith(".")]
    if stored and not overwrite:
        what = "already holds a store" if MANIFEST in stored else "holds an unfinished store"
        raise StoreError(
            f"{target} {what}; use overwrite=true to replace it, or choose another directory"
        )
