"""Paths of SFT files: globs, and no file twice."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from nemo_kd.settings.files import REMOTE, file
from nemo_kd.sft.hashed import RowError


def expanded(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the paths with globs replaced by the files that match, sorted by name.

    An existing path is never a glob. Raises RowError for a glob that matches nothing, a file that
    is given twice, an address of remote storage, and an empty list.
    """
    found: dict[tuple[int, int], Path] = {}
    for given in [paths] if isinstance(paths, str | Path) else paths:
        for path in _matches(str(given)):
            identity = _identity(path)
            if identity in found:
                other = found[identity]
                both = f"{path} twice" if path == other else f"{path} and {other}, the same file"
                raise RowError(f"the SFT files are {both}; give each file once")
            found[identity] = path
    if not found:
        raise RowError("the list of SFT files is empty; give at least one")
    return list(found.values())


def _matches(given: str) -> list[Path]:
    if REMOTE in given:
        raise RowError(f"{given}: SFT files are read from disk; copy it to one")
    if not glob.has_magic(given) or os.path.lexists(given):
        return [Path(given)]
    matches = sorted(glob.glob(given, recursive=True))
    if not matches:
        raise RowError(f"no file matches {given}")
    return [Path(match) for match in matches]


def _identity(path: Path) -> tuple[int, int]:
    if not os.path.exists(path):
        hint = f"; several files are a list, [{path}]" if "," in str(path) else ""
        raise RowError(file("SFT file", hint)(str(path)))
    status = os.stat(path)
    return status.st_dev, status.st_ino
