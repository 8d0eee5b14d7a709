"""Write the tables of `configuration.md` from docstrings of dataclasses and comments of `conf/`.

    python docs/keys.py

rewrites the page between its markers `<!-- keys SOURCE -->` and `<!-- end -->`. SOURCE is a
dataclass and the block that it describes (`module.Class model.kd`; without a block, the complete
configuration), or a file of `conf/` and optionally one of its blocks (`model.kd` is left out).
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/configuration.md"
BLOCK = object()  # a block has a comment, but no default
MARKED = re.compile(r"(<!-- keys (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(page: str) -> str:
    """Return the page with tables made from the current code."""
    return MARKED.sub(lambda found: f"{found[1]}{table(found[2])}{found[3]}", page)


def table(source: str) -> str:
    """Return a table with a row for each explained key; the other keys are NeMo's."""
    rows = of_yaml(*source.split()) if ".yaml" in source else of_dataclass(*source.split())
    lines = ["", "| key | default | |", "|---|---|---|"]
    for key, default, meaning in rows:
        meaning = meaning.replace("|", r"\|").replace("<", "&lt;")
        lines.append(f"| `{key}` | {shown(default)} | {meaning} |")
    return "\n".join([*lines, "", ""])


def shown(default: Any) -> str:
    """Return a default in YAML's notation."""
    if default is BLOCK:
        return ""
    if default == "???":
        return "must be given"
    default = list(default) if isinstance(default, tuple) else default
    text = yaml.safe_dump(default, default_flow_style=True, width=1000)
    return f"`{text.removesuffix('...' + chr(10)).strip()}`"


def of_dataclass(path: str, block: str = "") -> Iterator[tuple[str, Any, str]]:
    """(key, default, docstring of the field), those of the base classes first."""
    module, _, name = path.rpartition(".")
    cls: Any = getattr(importlib.import_module(module), name)
    meanings, prefix = docstrings(cls), f"{block}." if block else ""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key, kind = f"{prefix}{field.name}", hints[field.name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from of_dataclass(f"{kind.__module__}.{kind.__name__}", key)
        else:
            yield key, default_of(field), re.sub(r"\bNone\b", "null", meanings[field.name])


def docstrings(cls: Any) -> dict[str, str]:
    """Field → the docstring below it."""
    meanings = {}
    for base in reversed(cls.__mro__[:-1]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for statement, after in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(after, ast.Expr):
                assert isinstance(statement.target, ast.Name)
                meanings[statement.target.id] = " ".join(ast.literal_eval(after.value).split())
    return meanings


def default_of(field: dataclasses.Field[Any]) -> Any:
    """`???`, as in the YAML files, without a default."""
    if field.default is not dataclasses.MISSING:
        return field.default
    made = field.default_factory
    return "???" if made is dataclasses.MISSING else made()


def of_yaml(name: str, block: str = "") -> Iterator[tuple[str, Any, str]]:
    """(dotted key, value, comment) of each key that has a comment on its line."""
    text = (ROOT / "conf" / name).read_text(encoding="utf-8")
    lines = text.splitlines()
    node = yaml.compose(text)
    for part in filter(None, block.split(".")):
        (node,) = (value for key, value in node.value if key.value == part)
    yield from explained(node, block, lines)


def explained(
    node: yaml.MappingNode, prefix: str, lines: list[str]
) -> Iterator[tuple[str, Any, str]]:
    for key, value in node.value:
        path = f"{prefix}.{key.value}" if prefix else key.value
        if path in ("hydra", "model.kd"):
            continue
        _, _, comment = lines[key.start_mark.line].partition("  # ")
        comment = comment.strip()
        if isinstance(value, yaml.MappingNode) and value.value:
            if comment:
                yield f"{path}.*", BLOCK, comment
            yield from explained(value, path, lines)
        elif comment:
            yield path, yaml.safe_load(yaml.serialize(value)), comment


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")))
