"""Paths as users write them: `~` for the home directory, and links that lead nowhere."""

from __future__ import annotations

import os
from pathlib import Path


def expand_home(path: str) -> str:
    """Replace a leading `~/`, or a path that is only `~`, by the home directory.

    `~user` is not expanded, as a directory may have that name; `./~/x` is a path in a directory
    named `~`.
    """
    return os.path.expanduser(path) if path == "~" or path.startswith("~/") else path


def dangling_link(path: str | Path) -> str:
    """Describe the first link among `path` and its parents whose target is missing; "" if none."""
    for one in (Path(path), *Path(path).parents):
        if os.path.islink(one) and _is_missing(one):
            return f"{one} is a link to {os.readlink(one)}, which does not exist"
    return ""


def _is_missing(path: Path) -> bool:
    try:
        os.stat(path)
    except FileNotFoundError:
        return True
    except OSError:  # it may exist: a directory on the way cannot be read, say
        return False
    return False
