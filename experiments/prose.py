"""Technical prose from docstrings: name and summary line as prompt, the paragraphs as answer."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "demo"))

from make_data import Pair

MIN_WORDS = 12  # of a description
# A description ends at a numpydoc section, a directive, a doctest, a table or a list.
NOT_PROSE = re.compile(r"^\s*(\.\. |>>> |[-=*~]{3,}|[-*+] |:\w+|\|)|::\s*$|\\\w", re.MULTILINE)
WORD = re.compile(r"[A-Za-z]{2,}")


def description(docstring: str) -> tuple[str, str] | None:
    """Summary and description, one line per paragraph; None if there is no prose."""
    paragraphs = re.split(r"\n\s*\n", docstring.strip())
    summary, *rest = (" ".join(paragraph.split()) for paragraph in paragraphs)
    prose = []
    for text, source in zip(rest, paragraphs[1:], strict=True):
        if NOT_PROSE.search(source) or not text.endswith((".", ":")):
            break
        prose.append(text)
    answer = "\n\n".join(prose)
    if len(WORD.findall(answer)) < MIN_WORDS or NOT_PROSE.search(summary) or not summary:
        return None
    return summary, answer


def documented(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield name and docstring of each function, class and method."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, ast.get_docstring(node) or ""
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    yield f"{node.name}.{member.name}", ast.get_docstring(member) or ""


def descriptions(package: str, module: str, path: Path) -> Iterator[Pair]:
    """Yield every usable description of a module."""
    for name, docstring in documented(ast.parse(path.read_text(encoding="utf-8"))):
        parts = description(docstring)
        if parts is not None:
            summary, answer = parts
            yield Pair(f"{module}.{name}: {summary}\n\n", answer, package, module, name)
