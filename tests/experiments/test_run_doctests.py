"""A generated function counts if the doctests of the function that it replaces pass."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import run_doctests
from run_doctests import app, has_doctests, written
from typer.testing import CliRunner

LIBRARY = '''
from functools import cached_property, wraps

def logged(function):
    @wraps(function)
    def call(*arguments):
        return function(*arguments)
    return call

def double(n):
    """Twice a number.

    >>> double(2)
    4
    """
    return helper(n)

def helper(n):
    return 2 * n

@logged
def decorated(n):
    """
    >>> decorated(3)
    9
    """
    return n * n

def unused(n):
    """
    >>> 1 + 1
    2
    """
    return n

def untested(n):
    """No example."""
    return n

def broken(n):
    """
    >>> broken(1)
    2
    """
    return n

class Base:
    def name(self):
        return "base"

class Point(Base):
    """A point."""

    def __init__(self, x, y=1):
        self.x, self.y = x, y

    def sum(self):
        """
        >>> Point(2, 3).sum()
        5
        """
        return self.x + self.y

    @property
    def first(self):
        """
        >>> Point(2).first
        2
        """
        return self.x

    @cached_property
    def last(self):
        """
        >>> Point(2).last
        1
        """
        return self.y

    @classmethod
    def at(cls, x):
        """
        >>> Point.at(4).x
        4
        """
        return cls(x)

    def name(self):
        """
        >>> Point(1).name()
        'base'
        """
        return super().name()
'''


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "doctested.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(run_doctests, "SECONDS", 3)
    yield "doctested"
    sys.modules.pop("doctested", None)


def row(function: str, head: str, body: str, module: str = "doctested") -> dict[str, Any]:
    return {"module": module, "function": function, "input": head, "output": f"\n    {body}"}


@pytest.mark.parametrize(
    ("function", "head", "body"),
    [
        ("double", "def double(n):", "return n + n"),
        ("double", "def double(n):", "return helper(n)"),
        ("decorated", "def decorated(n):", "return n**2"),
        ("Point.sum", "def sum(self):", "return sum([self.x, self.y])"),
        ("Point.first", "def first(self):", "return self.x"),
        ("Point.last", "def last(self):", "return self.y"),
        ("Point.at", "def at(cls, x):", "return cls(x=x)"),
        ("Point.__init__", "def __init__(self, x, y=1):", "self.x, self.y = x, y"),
    ],
)
def test_another_body_that_does_the_same_passes(
    library: str, function: str, head: str, body: str
) -> None:
    mine = row(function, head, body)
    assert written(mine, mine["output"]) == (function != "Point.__init__")  # it has no doctest
    assert not written(mine, "\n    return 'wrong'")
    assert has_doctests(mine) == (function != "Point.__init__")


@pytest.mark.parametrize(
    "body",
    [
        "return 2 *",
        "return missing(n)",
        "while True: pass",
        "raise SystemExit(0)",
        "import os; os._exit(0)",
        "return 4\n\ndef more(n):\n    return 4",
        "__import__('os').system('true'); return 4",
        "__import__('subprocess').run(['true']); return 4",
        "open('made', 'w'); return 4",
    ],
)
def test_a_body_that_does_not_run_or_does_more_than_compute_fails(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    monkeypatch.chdir(tmp_path)
    mine = row("double", "def double(n):", body)
    assert not written(mine, mine["output"])
    assert not (tmp_path / "made").exists()


def test_only_functions_whose_doctests_tell_right_from_wrong_are_kept(
    library: str, tmp_path: Path
) -> None:
    rows = [
        row("double", "def double(n):", "return 2 * n"),
        row("unused", "def unused(n):", "return n"),
        row("untested", "def untested(n):", "return n"),
        row("broken", "def broken(n):", "return n"),
        row("Point.name", "def name(self):", "return super().name()"),
        row("absent", "def absent(n):", "return n"),
        row("double", "def double(n):", "return 2 * n", module="no_such_module"),
    ]
    data, kept = tmp_path / "test.jsonl", tmp_path / "doctests.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in rows))
    assert CliRunner().invoke(app, ["find", str(data), f"--output={kept}"]).exit_code == 0
    assert kept.read_text() == json.dumps(rows[0]) + "\n"


def test_the_file_says_which_functions_passed(library: str, tmp_path: Path) -> None:
    samples = [
        {"module": library, "function": name, "prompt": head, "completions": {"student": body}}
        for name, head, body in (
            ("double", "def double(n):", "\n    return 2 * n"),
            ("double", "def double(n):", "\n    return 3 * n"),
            ("decorated", "def decorated(n):", "\n    return n * n"),
        )
    ]
    completions, product = tmp_path / "completions.json", tmp_path / "doctests.json"
    completions.write_text(json.dumps({"tokens": 9, "samples": samples}))
    done = CliRunner().invoke(app, ["judge", str(completions), f"--output={product}"])
    assert done.exit_code == 0, done.output
    assert json.loads(product.read_text()) == {"functions": 3, "right": "101"}
