"""Environments of other versions of NeMo and Megatron-core, beside the one that is running.

Each is an overlay: a directory with the packages that differ, first on PYTHONPATH. Megatron-core
0.17 and later need Python 3.12, which gets a virtual environment of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.processes import ROOT

VERSIONS = "import importlib.metadata as m; print(*(m.version(name) for name in sys.argv[1:]))"


class MissingPython(Exception):
    """There is no Python of the version that an environment needs."""


@dataclass(frozen=True)
class Environment:
    """The first of `packages`, each with its exact version, and what that version needs."""

    packages: tuple[str, ...]
    python: tuple[int, int] = (3, 11)

    @property
    def name(self) -> str:
        package, version = self.packages[0].split("==")
        return f"{'NeMo' if self.is_nemo else package} {version}"

    @property
    def is_nemo(self) -> bool:
        return self.packages[0].startswith("nemo_toolkit")


@dataclass(frozen=True)
class Made:
    """An environment that exists: its interpreter, its PYTHONPATH and the versions found there."""

    python: str
    path: str
    versions: dict[str, str]


def make(environment: Environment, directory: Path, newer: str | None = None) -> Made:
    """Install what the environment lacks in `directory`, unless it is there already.

    `newer`: an interpreter of Python 3.12 with torch and `nemo-kd[hf]`; None makes one.
    Errors: MissingPython.
    """
    python = sys.executable
    if sys.version_info < environment.python:
        python = newer or _newer_python(environment, directory)
    path = str(ROOT)
    lacking = [p for p in environment.packages if _version(python, path, p) != p.split("==")[1]]
    if lacking:
        overlay = directory / "overlays" / environment.name.replace(" ", "-")
        _install_once(python, overlay, "--no-deps", "--target", str(overlay), *lacking)
        path = os.pathsep.join([path, str(overlay)])
    versions = {
        name: _version(python, path, name)
        for name in ("torch", *(package.split("==")[0] for package in environment.packages))
    }
    expected = dict(package.split("==") for package in environment.packages)
    if {name: versions[name] for name in expected} != expected:
        raise RuntimeError(f"{environment.name} has {versions}; remove {directory}, then repeat")
    return Made(python, path, {"python": _python_version(python), **versions})


def _newer_python(environment: Environment, directory: Path) -> str:
    """Return the interpreter of a virtual environment of the newer Python, made once."""
    version = ".".join(map(str, environment.python))
    name = f"python{version}"
    python = directory / name / "bin/python"
    if not python.exists():
        found = shutil.which(name)
        if found is None:
            raise MissingPython(
                f"{environment.name} needs Python {version}, and there is no {name} on PATH; "
                "install it, or name an interpreter with torch and nemo-kd[hf]: --python312"
            )
        subprocess.run([found, "-m", "venv", directory / name], check=True)
    index = os.environ.get("TORCH_INDEX_URL")
    extra = ["--extra-index-url", index] if index else []
    _install_once(
        *(str(python), directory / f"{name}-packages", "-c", "constraints.txt", *extra),
        *("torch", "-e", ".[hf]"),
    )
    return str(python)


def _install_once(python: str, directory: Path, *arguments: str) -> None:
    """Run pip unless a stamp in `directory` says that it has succeeded with these arguments."""
    stamp = directory / ".installed"
    if stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) == [python, *arguments]:
        return
    shutil.rmtree(directory, ignore_errors=True)
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, *arguments], cwd=ROOT, check=True)
    directory.mkdir(parents=True, exist_ok=True)
    stamp.write_text(json.dumps([python, *arguments]), encoding="utf-8")


def _version(python: str, path: str, package: str) -> str:
    """Return the version that `python` finds on `path`; "" if there is none."""
    code = f"import sys; {VERSIONS}"
    done = subprocess.run(
        [python, "-c", code, package.split("==")[0]],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def _python_version(python: str) -> str:
    code = "import platform; print(platform.python_version())"
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()
