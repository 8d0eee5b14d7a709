"""Print docstrings and error messages of the package at random, for a review of their English.

python docs/prose_sample.py --seed 1 --docstrings 60 --messages 30
"""

from __future__ import annotations

import argparse
import ast
import random
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "nemo_kd"
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
SHORTEST = 20
"""Characters of a text that counts as a message."""


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of every docstring, those of fields included."""
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
            yield node.body[0].lineno, text
        if isinstance(node, ast.ClassDef | ast.Module):
            for statement in node.body[1:]:
                if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                    yield statement.lineno, str(statement.value.value)


def messages(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of what is raised or printed, with {} for what is filled in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            arguments = node.exc.args
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("print", "say"):
            arguments = node.args
        else:
            continue
        for argument in arguments:
            text = "".join(_parts(argument))
            if len(text) >= SHORTEST:
                yield node.lineno, text


def _parts(node: ast.AST) -> Iterator[str]:
    """The constant parts of a text, in order."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        for value in node.values:
            yield from _parts(value)
    elif isinstance(node, ast.FormattedValue):
        yield "{}"
    elif isinstance(node, ast.BinOp):
        yield from _parts(node.left)
        yield from _parts(node.right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--docstrings", type=int, default=60)
    parser.add_argument("--messages", type=int, default=30)
    arguments = parser.parse_args()
    chosen = random.Random(arguments.seed)
    trees = {
        path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))
    }
    for title, count, find in (
        ("docstring", arguments.docstrings, docstrings),
        ("message", arguments.messages, messages),
    ):
        found = [
            (path.relative_to(PACKAGE.parent), line, text)
            for path, tree in trees.items()
            for line, text in find(tree)
        ]
        for number, (path, line, text) in enumerate(chosen.sample(found, count), start=1):
            print(f"--- {title} {number} of {count} ({len(found)} in all): {path}:{line}\n{text}\n")


if __name__ == "__main__":
    main()
