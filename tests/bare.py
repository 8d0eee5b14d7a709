"""An environment with the packages of one extra, and nothing else of what is installed here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from tests.conftest import ROOT


def extra(name: str | None) -> list[str]:
    """The packages of `pip install nemo-kd[name]`, or of none; without their own requirements."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + (project["optional-dependencies"][name] if name else [])
    return [_name(line) for line in lines]


def run_bare(
    directory: Path, roots: list[str], *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Run python with links to `roots` and their requirements as its only site-packages."""
    links = directory / "site-packages"
    if not links.exists():
        links.mkdir(parents=True)
        for path in _top_level(_requirements(roots)):
            (links / path.name).symlink_to(path)
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        env={**os.environ, "PYTHONPATH": str(links)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def _name(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    assert found is not None
    return found[0]


def _requirements(names: list[str]) -> set[str]:
    """The packages and all that they require, optional extras apart."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            wanted = distribution(name).requires or []
        except PackageNotFoundError:  # for another platform
            continue
        found.add(name)
        waiting += [_name(line) for line in wanted if "extra ==" not in line]
    return found


def _top_level(names: set[str]) -> set[Path]:
    """What the packages put directly into site-packages."""
    paths: set[Path] = set()
    for name in names:
        package = distribution(name)
        parts = {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}
        paths |= {Path(str(package.locate_file(part))) for part in parts}
    return paths
