"""The files that a path with CHUNK_ID stands for: numbered 0, 1, 2, ... without a gap.

A gap is an error, whoever left it. That is also what tells a set that was only half replaced from
a whole one: `publish_chunks` removes and renames so that file 0 is missing from first to last.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from nemo_kd.errors import StoreError
from nemo_kd.files import commit

CHUNK_ID = "CHUNK_ID"
SHOWN = 5  # names of files in a message


def chunk_path(path: str | Path, number: int) -> Path:
    return Path(str(path).replace(CHUNK_ID, str(number)))


def chunk_paths(path: str | Path) -> list[Path]:
    """The files that `path` names; with CHUNK_ID all its chunks, in order.

    StoreError where there is none, or one is missing before the last.
    """
    if CHUNK_ID not in str(path):
        return [Path(path)]
    found = existing_chunks(path)
    if not found:
        raise StoreError(f"no file {chunk_path(path, 0)}: chunks are numbered from 0")
    missing = next((i for i in range(max(found)) if i not in found), None)
    if missing is not None:
        beyond = _listed([found[i] for i in sorted(found) if i > missing])
        raise StoreError(
            f"{chunk_path(path, missing)} is missing, but there is {beyond}: chunks are numbered "
            "from 0 without a gap; copy what is missing, or rename or remove the files beyond it"
        )
    return [found[i] for i in range(len(found))]


def existing_chunks(path: str | Path) -> dict[int, Path]:
    """The chunks of `path` that are there, by number, gaps or not.

    StoreError for what has a chunk's name and is no file, or a number with leading zeros.
    """
    parts = str(Path(path)).split(CHUNK_ID)
    number, again = r"(?P<number>[0-9]+)", r"(?P=number)"
    first, *others = map(re.escape, parts)
    pattern = re.compile(first + number + again.join(others), re.DOTALL)
    found: dict[int, Path] = {}
    for name in glob.iglob("*".join(map(glob.escape, parts)), include_hidden=True):
        match = pattern.fullmatch(name)
        if match is None:
            continue
        if not Path(name).is_file():
            raise StoreError(f"{name} has the name of a chunk but is no file; remove or rename it")
        if match["number"] != str(int(match["number"])):
            raise StoreError(
                f"{name}: chunks are numbered 0, 1, 2, ... without leading zeros; rename it to "
                f"{chunk_path(path, int(match['number']))}"
            )
        found[int(match["number"])] = Path(name)
    return found


def publish_chunks(path: str | Path, written: Sequence[Path]) -> None:
    """Rename the files `written` to the chunks of `path`; those of an earlier set are removed."""
    for _, old in sorted(existing_chunks(path).items()):
        old.unlink()
    for number in reversed(range(len(written))):
        commit(written[number], chunk_path(path, number))


def _listed(paths: Sequence[Path]) -> str:
    names = ", ".join(str(path) for path in paths[:SHOWN])
    return names + (f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else "")
