"""A block of a configuration as a data class: its keys, kinds of values and own checks."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from nemo_kd.errors import NemoKDError
from nemo_kd.settings.blocks import Block, check
from nemo_kd.settings.values import of_annotation

Settings = TypeVar("Settings")


def block_of(cls: type[Any]) -> Block:
    """The fields of a data class, each of the kind that it is annotated with."""
    hints = typing.get_type_hints(cls)
    return Block(
        {field.name: of_annotation(hints[field.name]) for field in dataclasses.fields(cls)}
    )


def settings_of(cls: type[Settings], block: DictConfig | None, where: str) -> Settings:
    """The block at `where`, such as `model.kd`, as the data class `cls`; its defaults for None.

    Errors: NemoKDError, naming the key, for an unknown one, a value of the wrong kind, and a value
    that `cls` itself refuses.
    """
    if block is None:
        return cls()
    check(block, block_of(cls), where)
    values: Any = OmegaConf.to_container(block, resolve=True)
    try:
        return cls(**values)
    except ValueError as error:
        first = str(error).split()[0]
        named = any(field.name == first for field in dataclasses.fields(cls))  # type: ignore[arg-type]
        raise NemoKDError(f"{where}.{error}" if named else str(error)) from error
