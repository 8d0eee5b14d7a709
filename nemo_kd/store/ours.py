"""Recognise what nemo-kd has written in a directory, so that nothing else is ever removed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_kd.errors import StoreError
from nemo_kd.files import read_json
from nemo_kd.lock import LOCK
from nemo_kd.outputs import SUFFIX
from nemo_kd.store.codecs.sampled import EARLIER_FIELDS
from nemo_kd.store.layout import SAMPLE_FIELDS
from nemo_kd.store.manifest import (
    ANSWERS,
    EXCHANGE,
    FORMAT,
    INDEX,
    MANIFEST,
    PACKING,
    REPLACED,
    SHARD,
    SPEC,
)

FILES = (MANIFEST, SPEC, PACKING, INDEX, EXCHANGE, ANSWERS)
FIELDS = (
    *SAMPLE_FIELDS,
    *("topk_ids", "topk_logits", "lse", "records", "kept"),
    *EARLIER_FIELDS,
)
"""Names of the fields of a shard or segment in all profiles."""
PART = re.compile(r"(shard|segment)-\d{5,}|\.(shard|segment)-\d{5,}\.tmp")
SPEC_KEYS = {"top_k", "vocab_size", "temperatures", "profile", "tokenizer"}
"""Keys of a spec in every version of the format."""


def is_store(directory: Path) -> bool:
    """Return whether the directory has the manifest or the spec of a store, finished or not."""
    manifest, spec = _json_object(directory / MANIFEST), _json_object(directory / SPEC)
    return manifest.get("format") == FORMAT or spec.keys() >= SPEC_KEYS


def refuse_foreign(directory: Path) -> None:
    """Raise StoreError if the directory is neither empty nor a store, or holds anything else."""
    if not directory.is_dir():
        raise StoreError(f"{directory} is a file, but a store is a directory; choose another name")
    foreign = next(_foreign(directory), None)
    if foreign is not None:
        raise StoreError(
            f"{directory} holds {foreign}, which is not part of a store; move it away, or choose "
            "another directory"
        )
    names = [path.name for path in directory.iterdir() if not _is_leftover(path.name)]
    if names and not is_store(directory):
        raise StoreError(
            f"{directory} holds {min(names)} but no store that this nemo-kd knows; remove it, or "
            "choose another directory"
        )


def remove_part(directory: Path) -> None:
    """Remove the directory of a shard or segment; raise StoreError if it holds anything else."""
    foreign = next(_foreign_in_part(directory), None)
    if foreign is not None:
        raise StoreError(
            f"{directory} holds {foreign}, which is not part of a store and would be removed; move "
            "it away, or choose another directory"
        )
    shutil.rmtree(directory)


def is_part(path: Path) -> bool:
    """Return whether a path is a directory with the name of a complete shard or segment."""
    return (
        bool(PART.fullmatch(path.name))
        and not path.name.startswith(".")
        and path.is_dir()
        and not path.is_symlink()
    )


def _foreign(directory: Path) -> Iterator[str]:
    """Yield the paths, relative to `directory`, that are not a store's."""
    for path in sorted(directory.iterdir()):
        if path.name == REPLACED and path.is_dir() and not path.is_symlink():
            yield from (f"{path.name}/{name}" for name in _foreign(path))
        elif PART.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            yield from (f"{path.name}/{name}" for name in _foreign_in_part(path))
        elif not ((path.name in FILES and path.is_file()) or _is_leftover(path.name)):
            yield path.name


def _foreign_in_part(directory: Path) -> Iterator[str]:
    known = {SHARD, *(f"{field}.{end}" for field in FIELDS for end in ("bin", "idx"))}
    for path in sorted(directory.iterdir()):
        temporary = re.fullmatch(rf"\.{re.escape(SHARD)}\.[0-9a-f]+\.tmp", path.name)
        if path.is_dir() or not (path.name in known or temporary):
            yield path.name


def _is_leftover(name: str) -> bool:
    """Return whether the name is that of a lock or of a file or directory being written."""
    if name == LOCK or name.startswith(f"{LOCK}."):
        return True
    files = "|".join(map(re.escape, FILES))
    return bool(re.fullmatch(rf"\.({files})({re.escape(SUFFIX)}|\.[0-9a-f]+\.tmp)", name))


def _json_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = read_json(path)
    except (StoreError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
