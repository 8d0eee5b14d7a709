"""Chunked files: CHUNK_ID in a path stands for the numbers 0, 1, 2, ... of consecutive files.

A gap in the numbers is an error. This also detects a partly replaced set of files:
`publish_chunks` removes file 0 first and writes it last.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from nemo_kd.errors import StoreError
from nemo_kd.files import flush, fsync

CHUNK_ID = "CHUNK_ID"
SHOWN = 5  # maximum number of file names in a message


def chunk_path(path: str | Path, number: int) -> Path:
    """Return the path of one chunk."""
    return Path(str(path).replace(CHUNK_ID, str(number)))


def chunk_paths(path: str | Path) -> list[Path]:
    """Return the files that `path` names: itself, or with CHUNK_ID all its chunks in order.

    Raises StoreError if there is no chunk or a chunk before the last is missing.
    """
    if CHUNK_ID not in str(path):
        return [Path(path)]
    found = existing_chunks(path)
    if not found:
        raise StoreError(f"{chunk_path(path, 0)} does not exist; chunks are numbered from 0")
    missing = next((i for i in range(max(found)) if i not in found), None)
    if missing is not None:
        beyond = _listed([found[i] for i in sorted(found) if i > missing])
        raise StoreError(
            f"{chunk_path(path, missing)} is missing before {beyond}: chunks are numbered from 0 "
            "without gaps; copy the missing files, or rename or remove the later ones"
        )
    return [found[i] for i in range(len(found))]


def existing_chunks(path: str | Path) -> dict[int, Path]:
    """Return the existing chunks of `path` by number, possibly with gaps.

    Raises StoreError if a chunk is not a file or its number has leading zeros.
    """
    parts = str(Path(path)).split(CHUNK_ID)
    number, same_number = r"(?P<number>[0-9]+)", r"(?P=number)"
    first, *others = map(re.escape, parts)
    pattern = re.compile(first + number + same_number.join(others), re.DOTALL)
    found: dict[int, Path] = {}
    for name in glob.iglob("*".join(map(glob.escape, parts)), include_hidden=True):
        match = pattern.fullmatch(name)
        if match is None:
            continue
        if not Path(name).is_file():
            raise StoreError(f"{name} is named like a chunk but is not a file; remove or rename it")
        if match["number"] != str(int(match["number"])):
            raise StoreError(
                f"{name}: chunks are numbered 0, 1, 2, ... without leading zeros; rename it to "
                f"{chunk_path(path, int(match['number']))}"
            )
        found[int(match["number"])] = Path(name)
    return found


def publish_chunks(path: str | Path, written: Sequence[Path]) -> None:
    """Replace the existing chunks of `path` with the files `written`, by renaming them.

    All of them are on disk before the first existing chunk is removed.
    """
    for number, file in enumerate(written):
        flush(file)
        chunk_path(path, number).parent.mkdir(parents=True, exist_ok=True)
    for _, old in sorted(existing_chunks(path).items()):
        old.unlink()
    for number in reversed(range(len(written))):
        target = chunk_path(path, number)
        os.replace(written[number], target)
        fsync(target.parent)


def _listed(paths: Sequence[Path]) -> str:
    names = ", ".join(str(path) for path in paths[:SHOWN])
    return names + (f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else "")
