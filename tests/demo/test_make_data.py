"""The demo's data: real functions, unchanged, none of them on both sides of the split."""

from __future__ import annotations

import ast
import json
import textwrap
from pathlib import Path
from typing import Any

import make_data
import pytest

from nemo_kd.errors import NemoKDError

MODULES = make_data.package_modules("networkx")[:60]


@pytest.fixture(scope="module")
def pairs() -> list[make_data.Pair]:
    return [pair for module in MODULES for pair in make_data.extract("networkx", *module)]


def test_prompt_and_answer_together_are_the_function(pairs: list[make_data.Pair]) -> None:
    """With NeMo's template, which puts a space between the two, as well."""
    assert len(pairs) > 100
    sources = {name: ast.parse(path.read_text()) for name, path in MODULES}
    originals = {
        (module, name, node.lineno): node
        for module, tree in sources.items()
        for name, node in make_data.functions(tree)
    }
    bodies: dict[tuple[str, str], list[list[str]]] = {(m, name): [] for m, name, _ in originals}
    for (module, name, _), node in originals.items():
        bodies[module, name].append([ast.dump(part) for part in node.body[1:]])
    for pair in pairs:
        for text in (pair.input + pair.output, f"{pair.input} {pair.output}"):
            (function,) = ast.parse(text).body
            assert isinstance(function, ast.FunctionDef)
            body = [ast.dump(part) for part in function.body[1:]]
            assert body in bodies[pair.module, pair.function]
            assert ast.get_docstring(function)


def test_stripping_as_nemo_does_changes_nothing(pairs: list[make_data.Pair]) -> None:
    for pair in pairs:
        assert pair.input.strip(" ") == pair.input
        assert pair.output.strip(" ") == pair.output


def test_a_body_written_otherwise_is_the_same_body() -> None:
    def make(body: str) -> make_data.Pair:
        return make_data.Pair("def f(x):", textwrap.indent(body, "    "), "", "", "")

    one = make("\nreturn (x +\n        1)  # the next")
    assert make_data.body_key(one) == make_data.body_key(make("\nreturn x + 1"))
    assert make_data.body_key(one) != make_data.body_key(make("\nreturn x + 2"))


@pytest.mark.parametrize(
    "source",
    [
        'def f():\n    """Doc."""\n',
        'def f():\n    """Doc."""\n    pass\n',
        'def f():\n    """Doc."""\n    raise NotImplementedError\n',
        "def f():\n    return 1\n",
        'def f(): "Doc."; return 1\n',
        'class A:\n    def f(self):\n        """Doc."""\n        return """a\n    b"""\n',
    ],
)
def test_functions_with_nothing_to_learn_are_left_out(source: str) -> None:
    lines = source.splitlines(keepends=True)
    nodes = list(make_data.functions(ast.parse(source)))
    assert all(make_data.split_function(lines, node) is None for _, node in nodes)


def test_the_split_is_by_module_and_keeps_its_share() -> None:
    names = [f"package.module{i}" for i in range(2000)]
    held_out = [name for name in names if make_data.is_held_out(name, 0.1)]
    assert 150 < len(held_out) < 250
    assert all(make_data.is_held_out(name, 0.2) for name in held_out)


def test_the_script_writes_disjoint_sides_and_says_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.checkpoints import models

    models.tokenizer().save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setattr(make_data, "PACKAGES", ("networkx",))
    sizes: dict[str, Any] = {"train": 60, "heldout": 12, "max_tokens": 200}
    options = sizes | {"heldout_share": 0.2, "seed": 3}
    for name in ("once", "again"):
        make_data.main(tmp_path / "tokenizer", tmp_path / name, **options)
    sides = {}
    for side in ("train", "heldout"):
        text = (tmp_path / "once" / f"{side}.jsonl").read_text()
        assert text == (tmp_path / "again" / f"{side}.jsonl").read_text()
        sides[side] = [json.loads(line) for line in text.splitlines()]
        assert max(row["tokens"] for row in sides[side]) <= 200
    assert (len(sides["train"]), len(sides["heldout"])) == (60, 12)
    for key in ("module", "output"):
        seen = [{row[key] for row in rows} for rows in sides.values()]
        assert not seen[0] & seen[1]
    about = json.loads((tmp_path / "once" / "data.json").read_text())
    assert about["sources"][0]["licence"] == "BSD-3-Clause"
    assert "Redistribution" in (tmp_path / "once" / "LICENSES.txt").read_text()


def test_files_of_others_are_not_replaced(pairs: list[make_data.Pair], tmp_path: Path) -> None:
    make_data.write_jsonl(tmp_path / "train.jsonl", pairs[:2])
    make_data.refuse_foreign_files(tmp_path)
    for name in ("heldout.jsonl", "data.json"):
        (tmp_path / name).write_text('{"input": "a", "output": "b"}\n')
        with pytest.raises(NemoKDError, match=rf"{name} would be replaced, but it is not a"):
            make_data.refuse_foreign_files(tmp_path)
        (tmp_path / name).unlink()
