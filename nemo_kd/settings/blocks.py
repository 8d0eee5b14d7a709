"""Check a configuration against the known keys and their allowed values."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_kd.errors import NemoKDError
from nemo_kd.settings.moved import explained
from nemo_kd.settings.paths import expand_paths
from nemo_kd.settings.values import ANY, MAPPING, Kind
from nemo_kd.spelling import nearest

Keys = Mapping[str, "Kind | Block"]


@dataclass(frozen=True)
class Block:
    """The allowed keys of one block of a configuration, with the kinds of their values.

    `more` returns further keys; it may be slow, and is called only if a key is not in `keys`.
    `is_open`: any further key is allowed. `moved` (outermost block only): dotted keys of other
    programs → what to use instead.
    """

    keys: Keys
    more: Callable[[DictConfig], Keys] = field(default=lambda block: {})
    is_open: bool = False
    moved: Mapping[str, str] = field(default_factory=dict)


FREE = Block({}, is_open=True)
SAME_AS = re.compile(r"\$\{[\w.]+\}")
MAX_LISTED = 24
"""An error message lists a block's known keys if there are at most this many."""


def check(cfg: DictConfig, block: Block, where: str = "", root: Block | None = None) -> None:
    """Check the configuration `cfg` at the dotted key `where` against its block.

    Replaces `~/` at the beginning of its paths by the home directory.

    Errors: NemoKDError for an unknown key, naming the nearest one of that block or the block that
    has it; for a key without a value, and for a value of the wrong kind.
    """
    keys, complete = dict(block.keys), block.is_open
    for key in map(str, cfg):
        path = f"{where}.{key}" if where else key
        if key not in keys and not complete:
            keys, complete = {**block.more(cfg), **keys}, True
        if key not in keys and not block.is_open:
            raise NemoKDError(
                _unknown(_first_leaf(cfg, key, where), key, keys, where, root or block)
            )
        _check_value(cfg, key, path, keys.get(key, ANY), root or block)


def _check_value(cfg: DictConfig, key: str, path: str, known: Kind | Block, root: Block) -> None:
    if OmegaConf.is_missing(cfg, key):
        raise NemoKDError(f"{path} must be given: add {path}=VALUE to the command.")
    with _errors_name(path):
        value = cfg[key]
    if isinstance(known, Block):
        if isinstance(value, DictConfig):
            check(value, known, path, root)
        elif value is not None:
            raise NemoKDError(f"{path}{MAPPING(value)}")
        return
    with _errors_name(path):
        expand_paths(cfg, key, known)
    written = str(cfg._get_node(key)._value())  # type: ignore[union-attr]
    if known is ANY or SAME_AS.fullmatch(written):
        return  # a reference to another key: an error should name that one
    value = cfg[key]
    with _errors_name(path):
        plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    if problem := known(plain):
        raise NemoKDError(f"{path}{problem}{_as_value(plain, written, known)}")


@contextmanager
def _errors_name(path: str) -> Iterator[None]:
    """Context manager that raises an error of an interpolation as one that names the key."""
    try:
        yield
    except OmegaConfBaseException as error:
        at = str(error.full_key or "")
        named = at if at.startswith(path) else path  # a list's error names its entry
        raise NemoKDError(f"{named}: {str(error).splitlines()[0]}") from error


def _as_value(text: Any, written: str, known: Kind) -> str:
    """Return how to give a text as the allowed value that it reads like; "" for anything else."""
    if not isinstance(text, str) or "${" in text:
        return ""
    try:
        value = OmegaConf.create({"text": text, "value": "${oc.decode:${text}}"}).value
    except OmegaConfBaseException:
        return ""
    if not known.fits(OmegaConf.to_container(value) if OmegaConf.is_config(value) else value):
        return ""
    if "${" in written:
        return f" It is a text: write ${{oc.decode:{written}}} for its value."
    return " It is a text: leave out the quotes."


def _first_leaf(cfg: DictConfig, key: str, where: str) -> str:
    """Return the dotted name of `key`; if it is a block, that of the first value inside it."""
    path = f"{where}.{key}" if where else key
    value = cfg._get_node(key)
    if isinstance(value, DictConfig) and not value._is_interpolation() and len(value):
        for inner in map(str, value):
            return _first_leaf(value, inner, path)
    return path


def _unknown(path: str, key: str, keys: Keys, where: str, root: Block) -> str:
    if explanation := explained(path, root.moved):
        return f"{path} is unknown here: {explanation}."
    prefix = f"{where}." if where else ""
    near = [prefix + each] if (each := nearest(key, keys)) else []
    sure = nearest(key, keys, cutoff=0.8)
    elsewhere = [each for each in all_keys(root) if each.rpartition(".")[2] == key]
    meant = near if sure or not elsewhere else elsewhere[:2]
    hint = f" did you mean {' or '.join(meant)}?" if meant else ""
    listed = f" Known: {', '.join(keys)}." if len(keys) <= MAX_LISTED else ""
    return f"{path} is unknown;{hint}{listed}" if hint or listed else f"{path} is unknown."


def all_keys(block: Block, where: str = "") -> Iterator[str]:
    """Yield the dotted names of a block's `keys`, nested blocks included."""
    for key, known in block.keys.items():
        if isinstance(known, Block):
            yield from all_keys(known, f"{where}{key}.")
        else:
            yield f"{where}{key}"
