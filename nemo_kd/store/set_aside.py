"""Make room for a dump that overwrites a store: the old store stays until the new one is complete.

A finished store is moved to `.replaced` in its directory, and removed from there once the manifest
of the new one is written. A dump that was interrupted is continued, not started over.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from nemo_kd.errors import StoreError
from nemo_kd.files import read_json
from nemo_kd.store.manifest import ANSWERS, EXCHANGE, INDEX, MANIFEST, PACKING, REPLACED, SPEC
from nemo_kd.store.ours import remove_part
from nemo_kd.store.parts import part_directories
from nemo_kd.store.spec import StoreSpec


def make_room(directory: Path, spec: StoreSpec) -> None:
    """Leave in `directory` at most the shards of an unfinished store of this spec.

    One process calls this. If it is killed, the next call resumes.
    """
    aside = directory / REPLACED
    if (directory / MANIFEST).exists():
        if aside.exists():
            shutil.rmtree(aside)  # older than the finished store
        aside.mkdir()
        os.replace(directory / MANIFEST, aside / MANIFEST)
    if (aside / MANIFEST).exists() and not (aside / SPEC).exists():
        for path in _contents(directory):
            os.replace(path, aside / path.name)
    elif not _is_of(directory, spec):
        for path in part_directories(directory):
            remove_part(path)
        for name in (EXCHANGE, INDEX, PACKING, SPEC):
            (directory / name).unlink(missing_ok=True)


def remove_replaced(directory: Path) -> None:
    """Remove the store that was set aside, now that the new one is complete."""
    if (directory / REPLACED).exists():
        shutil.rmtree(directory / REPLACED)


def _contents(directory: Path) -> list[Path]:
    """Return the files and directories of the old store, its spec last."""
    files = [directory / name for name in (ANSWERS, EXCHANGE, INDEX, PACKING, SPEC)]
    return [*part_directories(directory), *(path for path in files if path.exists())]


def _is_of(directory: Path, spec: StoreSpec) -> bool:
    try:
        value = read_json(directory / SPEC)
        return StoreSpec.from_json(value).resumable_json() == spec.resumable_json()
    except StoreError:
        return False
