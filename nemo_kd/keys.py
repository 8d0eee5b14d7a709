"""Keys of a configuration's blocks: an unknown one is an error with the nearest valid name."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

Settings = TypeVar("Settings")


def settings_of(cls: type[Settings], block: DictConfig | None, where: str) -> Settings:
    """The block at `where`, such as `model.kd`, as the data class `cls`; its defaults for None.

    Errors: ValueError for an unknown key, and what `cls` itself refuses.
    """
    check_keys(block, [field.name for field in dataclasses.fields(cls)], where)  # type: ignore[arg-type]
    values: Any = {} if block is None else OmegaConf.to_container(block, resolve=True)
    return cls(**values)


def check_keys(block: DictConfig | None, known: Collection[str], where: str) -> None:
    """Errors: ValueError for a key of the block at `where` that is not known."""
    for key in map(str, block or ()):
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {where}.{near[0]}? " if near else ""
            raise ValueError(f"{where}.{key} is unknown; {hint}Known: {', '.join(known)}")
