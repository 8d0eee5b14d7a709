"""Check blocks of a configuration against dataclasses, and construct the dataclasses."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, TypeGuard, TypeVar

from omegaconf import DictConfig, OmegaConf

from nemo_kd.errors import NemoKDError
from nemo_kd.settings.blocks import Block, check
from nemo_kd.settings.values import Kind, of_annotation

Settings = TypeVar("Settings")


def block_of(cls: type[Any]) -> Block:
    """Convert a dataclass to a `Block`: nested dataclasses become blocks, other fields keys."""
    return Block({name: _known(annotation) for name, annotation in _annotations(cls).items()})


def settings_of(cls: type[Settings], block: DictConfig | None, where: str = "") -> Settings:
    """Check the block at `where` (such as `model.kd`) and convert it to `cls`; None → defaults.

    Errors: NemoKDError, naming the key, for an unknown key, a value of the wrong kind, and a
    value that `cls` itself refuses.
    """
    if block is not None:
        check(block, block_of(cls), where)
    return checked_settings_of(cls, block, where)


def checked_settings_of(cls: type[Settings], block: DictConfig | None, where: str = "") -> Settings:
    """Convert an already checked block to `cls`, ignoring keys that `cls` does not have.

    Errors: NemoKDError for a key without a value, and a value that `cls` refuses.
    """
    values: Any = {} if block is None else OmegaConf.to_container(block, resolve=True)
    return _construct(cls, values, where)


def _annotations(cls: type[Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _is_block(annotation: Any) -> TypeGuard[type[Any]]:
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)


def _known(annotation: Any) -> Kind | Block:
    return block_of(annotation) if _is_block(annotation) else of_annotation(annotation)


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return (field.default, field.default_factory) != (dataclasses.MISSING,) * 2


def _refuse_null(cls: type[Any], key: str) -> None:
    """Raise NemoKDError if the block at `key`, which is null, has keys without a default."""
    for field in dataclasses.fields(cls):
        if not _has_default(field) and not _is_block(_annotations(cls)[field.name]):
            raise NemoKDError(
                f"{key} is null, and {key}.{field.name} with it, which must be given: leave out "
                f"{key}=null, or give {key}.{field.name} after it."
            )


def _construct(cls: type[Settings], values: Mapping[str, Any], where: str) -> Settings:
    annotations, prefix = _annotations(cls), f"{where}." if where else ""
    given = {name: values[name] for name in annotations if name in values}
    for name, annotation in annotations.items():
        if _is_block(annotation):
            if name in given and given[name] is None:
                _refuse_null(annotation, f"{prefix}{name}")
            given[name] = _construct(annotation, given.get(name) or {}, f"{prefix}{name}")
        elif isinstance(given.get(name), list) and typing.get_origin(annotation) is tuple:
            given[name] = tuple(given[name])
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if not _has_default(field) and given.get(field.name, "???") == "???":
            key = f"{prefix}{field.name}"
            raise NemoKDError(f"{key} must be given: add {key}=VALUE to the command.")
    try:
        return cls(**given)
    except NemoKDError as error:
        named = str(error).split()[0] in annotations
        raise NemoKDError(f"{prefix}{error}" if named else str(error)) from error
