"""Judge generated functions: do they parse, and do they equal the reference?"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any


def tree(prompt: str, body: str) -> str | None:
    """The function's syntax tree as text, without its docstring; None if it does not parse."""
    try:
        (function,) = ast.parse(prompt + body).body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    if not isinstance(function, ast.FunctionDef) or len(function.body) < 2:
        return None
    return "\n".join(ast.dump(statement) for statement in function.body[1:])


def judge(samples: Sequence[dict[str, Any]], model: str = "student") -> dict[str, Any]:
    """The numbers of `samples`, of functions with a body (`parses`) and of matches (`exact`).

    A function matches if its syntax tree equals the reference's.
    """
    parses = exact = 0
    for sample in samples:
        written = tree(sample["prompt"], sample["completions"][model])
        parses += written is not None
        exact += written is not None and written == tree(sample["prompt"], sample["reference"])
    return {"samples": len(samples), "parses": parses, "exact": exact}
