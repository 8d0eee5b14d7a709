"""`constraints.txt` resolves from PyPI alone, without what this machine is configured with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

EXTRAS = ("nemo", "nemo,dev", "docs", "eval", "qad")
CONFIGURED = ("PIP_FIND_LINKS", "PIP_CONSTRAINT", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX")
OFFLINE = ["--no-cache-dir", "--disable-pip-version-check"]


def run(*command: object) -> subprocess.CompletedProcess[str]:
    """With the defaults of pip and uv."""
    environment = {key: value for key, value in os.environ.items() if key not in CONFIGURED}
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**environment, "PIP_CONFIG_FILE": os.devnull, "UV_NO_CONFIG": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="session")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin` of an environment with the newest pip and uv."""
    bin_directory = tmp_path_factory.mktemp("tools") / "bin"
    run(sys.executable, "-m", "venv", bin_directory.parent).check_returncode()
    done = run(bin_directory / "python", "-m", "pip", "install", "--quiet", "-U", "pip", "uv")
    if done.returncode:
        pytest.skip(f"no package index is reachable: {done.stderr.strip().splitlines()[-1]}")
    return bin_directory


@pytest.mark.index
@pytest.mark.parametrize("extras", EXTRAS)
def test_the_newest_pip_resolves_the_pins(extras: str, tools: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    install = ["install", "--quiet", "--dry-run", "--ignore-installed", "-c", "constraints.txt"]
    done = run(
        tools / "python", "-m", "pip", *install, "--report", report, "torch", "-e", f".[{extras}]"
    )
    assert done.returncode == 0, done.stderr
    found = {
        item["metadata"]["name"].lower(): item["metadata"]["version"]
        for item in json.loads(report.read_text())["install"]
    }
    assert found["torch"] == pins()["torch"]
    for name, version in pins().items():
        assert found.get(name.lower(), version) == version


@pytest.mark.index
@pytest.mark.parametrize("python", ["3.11", "3.12"])
@pytest.mark.parametrize("extras", EXTRAS)
def test_uv_resolves_the_pins_for_both_pythons(
    extras: str, python: str, tools: Path, tmp_path: Path
) -> None:
    options = [f"--extra={extra}" for extra in extras.split(",")]
    options += [f"--python-version={python}", "--python-platform=x86_64-manylinux_2_28"]
    output = tmp_path / "resolved.txt"
    command = [tools / "uv", "pip", "compile", "-q", "-c", "constraints.txt", *options]
    done = run(*command, "-o", output, "pyproject.toml")
    assert done.returncode == 0, done.stderr
    assert f"torch=={pins()['torch']}" in output.read_text()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines)


def wheel(directory: Path, name: str, version: str, *requires: str) -> None:
    """An empty package, as an index of one directory a name offers it."""
    (directory / name).mkdir(parents=True)
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    file = directory / name / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    link = file.name.replace("+", "%2B")
    (directory / name / "index.html").write_text(f'<a href="{link}">{file.name}</a>')


@pytest.mark.parametrize("local", ["", "+cpu"])
def test_a_build_of_pytorchs_index_is_preferred_and_the_rest_is_pypis(
    local: str, tmp_path: Path
) -> None:
    """Two indexes in two directories: the second is searched beside the first, as the Makefile and
    Dockerfile.cpu say it. It lacks what torch requires."""
    pypi, pytorch = tmp_path / "pypi", tmp_path / "pytorch"
    wheel(pypi, "sympy", pins()["sympy"])
    wheel(pypi, "triton", pins()["triton"])
    wheel(pypi, "torch", pins()["torch"], "sympy", f"triton=={pins()['triton']}")
    if local:
        wheel(pytorch, "torch", pins()["torch"] + local, "sympy")
    indexes = ["--index-url", pypi.as_uri(), "--extra-index-url", pytorch.as_uri()]
    pip = [sys.executable, "-m", "pip", "install", *OFFLINE, "--quiet", "--dry-run"]
    done = run(
        *pip, "--ignore-installed", "-c", "constraints.txt", *indexes, "--report", "-", "torch"
    )
    assert done.returncode == 0, done.stderr
    found = {
        item["metadata"]["name"]: item["metadata"]["version"]
        for item in json.loads(done.stdout)["install"]
    }
    assert found["torch"] == pins()["torch"] + local
    assert found["sympy"] == pins()["sympy"]
    assert ("triton" in found) == (not local)


def test_dockerfile_and_makefile_search_pytorchs_index_beside_pypi() -> None:
    command = "--extra-index-url"
    assert f'{command} "$TORCH_INDEX_URL" torch' in (ROOT / "Dockerfile.cpu").read_text()
    assert f'{command} "$(TORCH_INDEX_URL)") torch' in (ROOT / "Makefile").read_text()
