"""The data's descriptions: prompts that also occur in training, domains, numbers of rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from split_data import split_of

from tests.checkpoints import models
from tests.conftest import ROOT

FUNCTION = '''\
def {name}(a, b):
    """Combine two numbers."""
    total = a * {number} + b
    return total
'''


def script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "experiments" / name), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    models.tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def write_package(site: Path, modules: dict[str, list[str]]) -> None:
    """An installed package `small`; the functions' bodies all differ."""
    (site / "small").mkdir(parents=True)
    (site / "small" / "__init__.py").write_text("")
    (site / "small-1.dist-info").mkdir()
    (site / "small-1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: small\nVersion: 1\nLicense: BSD\n"
    )
    (site / "small-1.dist-info" / "LICENSE").write_text("BSD")
    (site / "small-1.dist-info" / "RECORD").write_text("small-1.dist-info/LICENSE,,\n")
    numbers = count()
    for module, names in modules.items():
        text = "\n\n".join(FUNCTION.format(name=name, number=next(numbers)) for name in names)
        (site / "small" / f"{module}.py").write_text(text)


def modules_of(split: str, number: int) -> list[str]:
    names = (f"m{i}" for i in range(1000) if split_of(f"small.m{i}") == split)
    return [next(names) for _ in range(number)]


def test_held_out_prompts_that_are_also_in_training_are_counted(
    tmp_path: Path, tokenizer: Path
) -> None:
    of_split = {"train": ["common", "other"], "valid": ["new", "common"], "test": ["new"]}
    functions = {m: names for split, names in of_split.items() for m in modules_of(split, 2)}
    write_package(tmp_path / "site", functions)
    sizes = ("--train=4", "--valid=4", "--test=2", "--groups=2", "--max-tokens=400")
    done = script(
        "split_data.py",
        *("code", f"--tokenizer={tokenizer}", f"--output-dir={tmp_path}", "--packages=small"),
        *sizes,
        PYTHONPATH=f"{tmp_path / 'site'}:{ROOT}",
    )
    assert done.returncode == 0, done.stderr
    about = json.loads((tmp_path / "data.json").read_text())
    assert "prompts_in_training" not in about["train"]
    assert about["valid"]["prompts_in_training"] == 2
    assert about["test"]["prompts_in_training"] == 0


@pytest.mark.parametrize(("options", "domain"), [([], "math"), (["--several-wordings"], "worded")])
def test_worked_problems_name_their_domain(
    tmp_path: Path, tokenizer: Path, options: list[str], domain: str
) -> None:
    sizes = ("--train=4", "--valid=4", "--test=4", "--groups=1", "--max-tokens=400")
    arguments = (f"--tokenizer={tokenizer}", f"--output-dir={tmp_path}", *sizes, *options)
    assert script("make_problems.py", *arguments, PYTHONPATH=str(ROOT)).returncode == 0
    about: dict[str, Any] = json.loads((tmp_path / "data.json").read_text())
    assert about["domain"] == domain


def test_fewer_rows_than_asked_are_refused(tmp_path: Path) -> None:
    source, output = tmp_path / "rows.jsonl", tmp_path / "first.jsonl"
    source.write_text("1\n2\n3\n")
    arguments = (str(source), f"--output={output}")
    few = script("first_rows.py", *arguments, "--rows=2", PYTHONPATH=str(ROOT))
    assert few.returncode == 0 and output.read_text() == "1\n2\n"
    output.unlink()
    many = script("first_rows.py", *arguments, "--rows=4", PYTHONPATH=str(ROOT))
    assert many.returncode and "has 3 rows" in many.stderr and not output.exists()
