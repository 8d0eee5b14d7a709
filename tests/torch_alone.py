"""An environment with torch and numpy and nothing else of what is installed here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

ROOTS = ("torch", "numpy")


def torch_alone(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run python with links to those packages and their own requirements as its site-packages."""
    links = directory / "site-packages"
    if not links.exists():
        links.mkdir(parents=True)
        for path in top_level(requirements(ROOTS)):
            (links / path.name).symlink_to(path)
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        env={**os.environ, "PYTHONPATH": str(links)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def requirements(names: tuple[str, ...]) -> set[str]:
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
        plain = [line for line in wanted if "extra ==" not in line]
        waiting += [re.match(r"[\w.-]+", line)[0] for line in plain]  # type: ignore[index]
    return found


def top_level(names: set[str]) -> set[Path]:
    """What the packages put directly into site-packages."""
    paths: set[Path] = set()
    for name in names:
        package = distribution(name)
        parts = {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}
        paths |= {Path(str(package.locate_file(part))) for part in parts}
    return paths
