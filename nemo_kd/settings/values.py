"""Kinds of configuration values, each with a check and a description for error messages."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from nemo_kd.loss.names import did_you_mean


@dataclass(frozen=True)
class Kind:
    """A set of allowed values.

    Calling it with a value returns "" if the value is allowed, else an error message without its
    beginning, the key.
    """

    expected: str
    fits: Callable[[Any], bool]
    hint: Callable[[Any], str] = lambda value: ""
    is_path: bool = False
    """Whether a text among these values is a path."""

    def __call__(self, value: Any) -> str:
        if self.fits(value):
            return ""
        return f" is {shown(value)}: expected {self.expected}.{self.hint(value)}"


def shown(value: Any) -> str:
    """Format a value for an error message, in YAML's notation and at most 80 characters."""
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


ANY = Kind("anything", lambda value: True)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind(
    "text",  # numbers too: YAML parses `name=7` as a number
    lambda value: isinstance(value, str | int | float) and not isinstance(value, bool),
)
PATH = Kind("a path", lambda value: isinstance(value, str) and bool(value), is_path=True)
MAPPING = Kind("a block of keys", lambda value: isinstance(value, Mapping))


def whole(minimum: int | None = None) -> Kind:
    """Allow integers, at least `minimum`."""
    expected = "a whole number" + ("" if minimum is None else f", at least {minimum}")
    return Kind(expected, lambda value: _is_int(value) and (minimum is None or value >= minimum))


def number(low: float = -math.inf, high: float = math.inf, *, above: bool = False) -> Kind:
    """Allow finite numbers in [low, high], or in (low, high] if `above`."""
    limits = {
        (-math.inf, math.inf): "a number",
        (0.0, math.inf): "a number above 0" if above else "a number, at least 0",
    }
    opening = "(" if above else "["
    expected = limits.get((low, high), f"a number in {opening}{low:g}, {high:g}]")

    def fits(value: Any) -> bool:
        return _is_number(value) and (low < value if above else low <= value) and value <= high

    return Kind(expected, fits)


def one_of(*names: Any, **aliases: str) -> Kind:
    """Allow the given names; `aliases` maps a name to its synonyms, separated by spaces."""
    return Kind(
        f"one of {', '.join(map(shown_name, names))}",
        lambda value: any(value == name and type(value) is type(name) for name in names),
        lambda value: did_you_mean(value, map(str, names), aliases),
    )


def shown_name(name: Any) -> str:
    return shown(name) if name is None or isinstance(name, bool) else str(name)


def optional(kind: Kind) -> Kind:
    """Allow the values of `kind`, and null."""
    expected = f"{kind.expected}, or null"
    return Kind(expected, lambda v: v is None or kind.fits(v), kind.hint, kind.is_path)


def either(*kinds: Kind) -> Kind:
    expected = ", or ".join(dict.fromkeys(kind.expected for kind in kinds))
    return Kind(
        expected,
        lambda value: any(kind.fits(value) for kind in kinds),
        kinds[-1].hint,
        any(kind.is_path for kind in kinds),
    )


def list_of(kind: Kind, length: int | None = None) -> Kind:
    count = "a list" if length is None else f"a list of {length}"

    def fits(value: Any) -> bool:
        if not isinstance(value, list | tuple) or length not in (None, len(value)):
            return False
        return all(kind.fits(entry) for entry in value)

    return Kind(f"{count}, each {kind.expected}", fits, is_path=kind.is_path)


def one_or_more(kind: Kind) -> Kind:
    return either(kind, list_of(kind))


def of_annotation(annotation: Any) -> Kind:
    """Return the kind of a dataclass field: from `Annotated[type, kind]`, else from its type.

    ANY for types without a kind.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return next((each for each in arguments[1:] if isinstance(each, Kind)), ANY)
    if origin in (typing.Union, types.UnionType):
        rest = [each for each in arguments if each is not type(None)]
        kind = either(*map(of_annotation, rest))
        return optional(kind) if len(rest) < len(arguments) else kind
    if origin in (tuple, list):
        return list_of(of_annotation(arguments[0]))
    simple = {bool: FLAG, int: whole(), float: number(), str: TEXT}
    return MAPPING if origin is dict else simple.get(annotation, ANY)


COUNT, NATURAL, SHARE = whole(1), whole(0), number(0, 1)
DEVICES = Kind(
    "a number of devices, a list of them, or auto",
    lambda v: (
        v in ("auto", "-1", -1)
        or COUNT.fits(v)
        or list_of(NATURAL).fits(v)
        or (isinstance(v, str) and v.replace(",", "").isdigit())
    ),
)
PRECISION = Kind(
    "one of 32, bf16, 16, bf16-mixed, 16-mixed, 32-true",
    lambda value: str(value) in ("32", "bf16", "16", "bf16-mixed", "16-mixed", "32-true"),
    one_of(
        "32",
        "bf16",
        "16",
        **{
            "16": "fp16 float16 half f16 16bit",
            "32": "fp32 float32 float single f32 full 32bit",
            "bf16": "bfloat16 bfloat brain",
        },
    ).hint,
)
ACCELERATOR = one_of("gpu", "cpu", "auto", "cuda", gpu="gpus", cpu="cpus")

Count = Annotated[int, COUNT]
Natural = Annotated[int, NATURAL]
PathText = Annotated[str, PATH]
