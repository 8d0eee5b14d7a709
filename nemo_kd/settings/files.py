"""Check a configuration's paths early: inputs exist, outputs can be written."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from nemo_kd.errors import NemoKDError
from nemo_kd.paths import dangling_link

Problem = Callable[[str], str]
"""Function of a path that returns an error message, or "" if the path is usable."""
REMOTE = "://"
"""Marks a remote storage address, which NeMo or the store's reader opens."""


def check_files(cfg: DictConfig, problems: Iterable[tuple[str, Problem]]) -> None:
    """Check the paths at dotted keys.

    Errors: NemoKDError that names the first key whose path has a problem.
    """
    for key, problem in problems:
        for path in paths_at(cfg, key):
            if REMOTE in path and problem is not store_directory:
                continue
            if found := problem(path):
                raise NemoKDError(f"{key}: {found}")


def address_problem(path: str) -> str:
    """Say that a store is not written to a remote address; "" for a local path.

    Also recognizes the `s3:/` that `Path` makes of `s3://`.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", path) is None:
        return ""
    return (
        f"{path} is an address, but a store is written to a local directory: give one, then copy "
        "it with nemo-kd push"
    )


def file_name_problem(path: str) -> str:
    """Say that a store is not a file if `path` is one, or has a file's suffix and is not there."""
    suffix = Path(path).suffix
    if os.path.isfile(path) or (suffix[1:].isalpha() and not os.path.isdir(path)):
        return (
            f"{path} is the name of a file, but a store is a directory: give a name without "
            f"{suffix or 'that of a file'}"
        )
    return ""


def store_directory(path: str) -> str:
    """Require an `output_directory` on a local disk whose name is not that of a file."""
    return address_problem(path) or output_directory(path) or file_name_problem(path)


def paths_at(cfg: DictConfig, key: str) -> Iterator[str]:
    """Yield the path or paths at a dotted key; nothing if it is absent or null."""
    value = OmegaConf.select(cfg, key)
    for path in [value] if isinstance(value, str) else value or []:
        yield str(path)


def file(what: str, hint: str = "") -> Problem:
    """Require a readable file."""

    def problem(path: str) -> str:
        if not os.path.exists(path):
            return f"no {what} at {path}{_nearest_parent(path)}{hint}"
        if os.path.isdir(path):
            return f"{path} is a directory: expected {what}, a file"
        return "" if os.access(path, os.R_OK) else f"{path} cannot be read: permission denied"

    return problem


def file_or_directory(what: str, inside: tuple[str, ...], hint: str = "") -> Problem:
    """Require a file, or a directory with one of the files `inside`."""

    def problem(path: str) -> str:
        if not os.path.isdir(path):
            return file(what, hint)(path)
        if any(os.path.exists(os.path.join(path, name)) for name in inside):
            return ""
        return f"the directory {path} has no {' or '.join(inside)}: expected {what}"

    return problem


def directory(what: str) -> Problem:
    """Require an existing directory."""

    def problem(path: str) -> str:
        if not os.path.exists(path):
            return f"no {what} at {path}{_nearest_parent(path)}"
        return "" if os.path.isdir(path) else f"{path} is a file: expected {what}, a directory"

    return problem


def new_file(path: str) -> str:
    """Require a path at which a file can be created and none exists."""
    if os.path.lexists(path):
        return f"{path} exists already; remove it or choose another name"
    return _cannot_make(path)


def output_file(path: str) -> str:
    """Require a path at which a file can be written or replaced."""
    if os.path.isdir(path):
        return f"{path} is a directory: expected the name of a file"
    return _cannot_make(path)


def output_directory(path: str) -> str:
    """Require a directory that exists or can be created."""
    if problem := dangling_link(path):
        return f"{problem}: create it, or give another directory"
    if os.path.exists(path) and not os.path.isdir(path):
        return f"{path} is a file: expected a directory, or a new name"
    return _cannot_make(os.path.join(path, "x"))


def _cannot_make(path: str) -> str:
    """Return why `path` and its missing parent directories cannot be created, or ""."""
    parent = _existing_parent(path)
    if not parent.is_dir():
        return f"{parent} is a file, so {path} cannot be created"
    if os.access(parent, os.W_OK | os.X_OK):
        return ""
    return f"{path} cannot be written: {parent} is read-only or owned by another user"


def _existing_parent(path: str) -> Path:
    parents = Path(os.path.abspath(path)).parents
    return next(parent for parent in parents if os.path.exists(parent))


def _nearest_parent(path: str) -> str:
    """Describe the nearest existing parent of a path, or the directory that a relative one is in.

    "" for an absolute path whose own directory exists.
    """
    parent = _existing_parent(path)
    if parent != Path(os.path.abspath(path)).parent:
        return f" ({parent} exists)"
    return "" if os.path.isabs(path) else f" (in {parent})"
