"""Find the settings of an installed package in its source, without importing it.

NeMo, Lightning and Megatron take ten seconds to import; reporting a misspelt key should not. So
this module parses their files for fields of dataclasses, parameters of constructors, and keys that
the code reads.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from nemo_kd.settings.values import ANY, FLAG, TEXT, Kind, either, number, optional, whole

SIMPLE = {"int": whole(), "float": number(), "bool": FLAG, "str": TEXT}


def source(module: str) -> Path | None:
    """Return the file of a module (`nemo.utils.exp_manager`); None if it is not installed."""
    package, *rest = module.split(".")
    spec = importlib.util.find_spec(package)
    for root in (spec.submodule_search_locations or []) if spec else []:
        path = Path(root, *rest)
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file
    return None


@cache
def _tree(module: str) -> ast.Module:
    file = source(module)
    return ast.parse(file.read_text(encoding="utf-8")) if file else ast.Module([], [])


def _class(module: str, name: str) -> ast.ClassDef | None:
    found = (node for node in _tree(module).body if isinstance(node, ast.ClassDef))
    return next((node for node in found if node.name == name), None)


def fields(module: str, name: str) -> dict[str, Kind]:
    """Map each field of a dataclass to the kind of its values."""
    node = _class(module, name)
    return {
        part.target.id: _kind(part.annotation)
        for part in (node.body if node else [])
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
    }


def field_classes(module: str, name: str) -> dict[str, str]:
    """Map each field of a dataclass whose type is a class of the same module to that class."""
    node = _class(module, name)
    classes = {part.name for part in _tree(module).body if isinstance(part, ast.ClassDef)}
    found = {}
    for part in node.body if node else []:
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            named = {each.id for each in ast.walk(part.annotation) if isinstance(each, ast.Name)}
            if held := named & classes:
                found[part.target.id] = held.pop()
    return found


def parameters(module: str, name: str) -> dict[str, Kind]:
    """Map each parameter of a class's constructor to the kind of its values.

    If the constructor has `**kwargs`, the parameters of the base classes are included.
    """
    node = _class(module, name)
    if node is None:
        return {}
    bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            arguments = [*part.args.args[1:], *part.args.kwonlyargs]
            found = {each.arg: _kind(each.annotation) for each in arguments}
            passed_on = bases if part.args.kwarg else []
            break
    else:
        found, passed_on = {}, bases
    for base in passed_on:
        found = parameters(module, base) | found
    return found


def _kind(annotation: ast.expr | None) -> Kind:
    """Return the kind of a simple type, a union or an optional; ANY for anything else."""
    if isinstance(annotation, ast.Name):
        return SIMPLE.get(annotation.id, ANY)
    if not isinstance(annotation, ast.Subscript):
        return ANY
    name, parts = ast.unparse(annotation.value), annotation.slice
    options = [_kind(each) for each in (parts.elts if isinstance(parts, ast.Tuple) else [parts])]
    if ANY in options or name not in ("Optional", "Union"):
        return ANY
    return optional(options[0]) if name == "Optional" else either(*options)


def named_classes(module: str, table: str) -> dict[str, str]:
    """Map the names in a table to its classes, as source text.

    Recognized are `table = {"name": Class}` and `table["name"] = Class`.
    """
    found = {}
    for node in ast.walk(_tree(module)):
        if not isinstance(node, ast.Assign):
            continue
        target = node.targets[0]
        if ast.unparse(target) == table and isinstance(node.value, ast.Dict):
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                if isinstance(key, ast.Constant):
                    found[str(key.value)] = ast.unparse(value)
        elif (
            isinstance(target, ast.Subscript)
            and ast.unparse(target.value) == table
            and isinstance(target.slice, ast.Constant)
        ):
            found[str(target.slice.value)] = ast.unparse(node.value)
    return found


def imported_from(module: str, name: str) -> str | None:
    """Return the module from which `module` imports `name`; None if it does not import it."""
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.ImportFrom) and any(each.name == name for each in node.names):
            return node.module
    return None


def keys_read(modules: Iterable[str], owner: str) -> list[str]:
    """Return the sorted keys that the modules read from a configuration object.

    `owner` is a pattern for the expression of that object. Recognized are `owner.get("key")`,
    `owner["key"]`, `owner.key`, `"key" in owner` and `hasattr(owner, "key")`.
    """
    quoted = r"""['"](\w+)['"]"""
    pattern = re.compile(
        rf"(?<![\w.])(?:{owner})(?:\.get\(\s*{quoted}|\[{quoted}|\.(\w+)\b(?!\s*\())"
        rf"|{quoted} (?:not )?in (?:{owner})(?![\w.])"
        rf"|(?:get|has|set)attr\((?:{owner}), ?{quoted}"
    )
    found: set[str] = set()
    for file in filter(None, map(source, modules)):
        for match in pattern.findall(file.read_text(encoding="utf-8")):
            found.update(filter(None, match))
    return sorted(found)
