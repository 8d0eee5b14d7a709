"""The Makefile finds a Python, installs what a command needs, and says what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT


def make(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`make` in a directory with the Makefile, nothing but `bin` there having a Python."""
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, directory)
    tools = directory / "bin"
    tools.mkdir(exist_ok=True)
    for name in ("cat", "sh"):
        if not (tools / name).exists():
            (tools / name).symlink_to(str(shutil.which(name)))
    return subprocess.run(
        [str(shutil.which("make")), "--no-print-directory", *arguments],
        cwd=directory,
        env={"PATH": str(tools), "HOME": os.environ.get("HOME", "/")},
        capture_output=True,
        text=True,
        timeout=60,
    )


def pretend(directory: Path, python: str, works: bool) -> None:
    """A `python` that only exits: with 0 for all it is asked, or as a pyenv shim does."""
    path = directory / "bin" / python
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\nexit {0 if works else 127}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        ({"python3.12": True, "python3.11": True, "python3": True}, "python3.12"),
        ({"python3.12": False, "python3.11": True}, "python3.11"),
        ({"python3": True}, "python3"),
    ],
)
def test_the_newest_python_that_works_is_taken(
    there: dict[str, bool], taken: str, tmp_path: Path
) -> None:
    for python, works in there.items():
        pretend(tmp_path, python, works)
    assert f"{taken} -m venv .venv" in make(tmp_path, "-n", "demo").stdout.splitlines()


@pytest.mark.parametrize("chosen", [(), ("PYTHON=python3.13",)])
def test_without_one_the_command_that_makes_an_environment_is_printed(
    chosen: tuple[str, ...], tmp_path: Path
) -> None:
    for python in ("python3.12", "python3"):
        pretend(tmp_path, python, works=False)
    done = make(tmp_path, "demo", *chosen)
    assert done.returncode and "    uv venv --seed --python 3.12 .venv\n" in done.stderr


def test_the_demo_installs_neither_linters_nor_test_tools(tmp_path: Path) -> None:
    pretend(tmp_path, "python3.12", works=True)
    lines = make(tmp_path, "-n", "demo").stdout.splitlines()
    assert [line.split()[-1] for line in lines if " -e " in line] == ["'.[nemo]'"]
    lines = make(tmp_path, "-n", "test").stdout.splitlines()
    assert [line.split()[-1] for line in lines if " -e " in line] == ["'.[nemo]'", "'.[nemo,dev]'"]


def test_another_torch_than_the_environments_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/.demo").write_text("https://first\n")
    assert not make(tmp_path, "-n", "help", "TORCH_INDEX_URL=https://first").returncode
    assert not make(tmp_path, "-n", "help").returncode
    done = make(tmp_path, "demo", "TORCH_INDEX_URL=https://second")
    assert done.returncode and "remove .venv" in done.stderr


def test_paths_may_have_spaces(tmp_path: Path) -> None:
    (directory := tmp_path / "my checkout").mkdir()
    pretend(directory, "python3", works=True)
    python = directory / "bin" / "gpu-python"
    python.write_text('#!/bin/sh\necho "<$PYTHONPATH>" "$@"\n')
    python.chmod(0o755)
    done = make(directory, "gpu", "GPU_PYTHON=gpu-python", "GPU_PARTS=loss")
    assert done.stdout == f"<{directory}> -m benchmarks.gpu.run loss\n", done.stderr
    where = ("RESULTS=my results", "MATRIX=my matrix", "PYTHON312=/my python/bin/python")
    said = make(directory, "-n", "experiments", "matrix", *where).stdout
    assert said.count('results="my results" out="my results/work"\n') == 3
    assert '--directory "my matrix" --python312 "/my python/bin/python"\n' in said
