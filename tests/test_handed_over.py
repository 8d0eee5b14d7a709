"""A step's state is handed over by calls: no class sets an attribute of an object that it holds."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "nemo_kd"
ROOMS = ("data", "teacher", "mcore", "nemo", "hf")
FOREIGN = {
    ("nemo/families.py", "self.cfg.rotary_base"),
    ("nemo/model.py", "self.cfg.target"),
    ("nemo/vocabulary.py", "self.tokenizer.__class__"),
}
"""NeMo's own configuration and tokenizer: RoPE's base while NeMo builds the model, the class that
a saved model names, and the class that counts ids."""


def trees() -> Iterator[tuple[str, ast.Module]]:
    for room in ROOMS:
        for path in sorted((PACKAGE / room).rglob("*.py")):
            yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text())


def set_on_held_objects(tree: ast.Module) -> set[str]:
    """`self.x.y` wherever it is assigned."""
    return {
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Attribute)
        and ast.unparse(node).startswith("self.")
    }


def read_of_the_loss(tree: ast.Module) -> set[str]:
    """Attributes of `student_loss` that are used but not called."""
    called = {node.func for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return {
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and ast.unparse(node.value).endswith("student_loss")
        and node not in called
        and node.attr != "StudentLoss"  # the module's class
    }


def test_no_class_sets_an_attribute_of_an_object_that_it_holds() -> None:
    assert {(path, name) for path, tree in trees() for name in set_on_held_objects(tree)} == FOREIGN


def test_the_students_loss_is_only_called() -> None:
    assert not {(path, name) for path, tree in trees() for name in read_of_the_loss(tree)}


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("self.loss.kd = 1", {"self.loss.kd"}),
        ("self.loss.kd += 1", {"self.loss.kd"}),
        ("self.a, self.loss.kd = 1, 2", {"self.loss.kd"}),
        ("self.kd = 1; loss.kd = 1; self.loss.begin(1); x = self.loss.kd", set()),
    ],
)
def test_an_assignment_is_found(code: str, found: set[str]) -> None:
    assert set_on_held_objects(ast.parse(code)) == found
