"""What is shipped: a wheel of the typed package alone, and a source distribution to work from."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import nemo_kd
from tests.conftest import ROOT
from tests.torch_alone import torch_alone

BUILD = "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"
NOT_SHIPPED = (".git", ".venv", ".*_cache", ".hypothesis", "outputs", "__pycache__", "*.egg-info")


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools writes beside what it reads."""
    copy = tmp_path_factory.mktemp("dist") / "nemo-kd"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_SHIPPED, "dist", "build"))
    done = subprocess.run(
        [sys.executable, "-c", BUILD], cwd=copy, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return copy / "dist"


def test_the_wheel_has_the_whole_package_and_nothing_else(dist: Path) -> None:
    (wheel,) = dist.glob(f"nemo_kd-{nemo_kd.__version__}-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    source = dist.parent
    package = {str(path.relative_to(source)) for path in (source / "nemo_kd").rglob("*.py")}
    assert package | {"nemo_kd/py.typed"} == {
        n for n in names if not n.split("/")[0].endswith("info")
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)
    metadata = next(name for name in names if name.endswith("METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    required = [line for line in text.splitlines() if line.startswith("Requires-Dist")]
    always = [line for line in required if "extra ==" not in line]
    assert always == ["Requires-Dist: torch>=2.3", "Requires-Dist: numpy"]


def test_the_source_distribution_is_enough_to_work_from(dist: Path) -> None:
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    wanted = ["conf/train_gpt_sft_kd.yaml", "examples/train_gpt_sft_kd.py", "tests/conftest.py"]
    wanted += ["LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "constraints.txt"]
    assert set(wanted) <= names
    assert not [name for name in names if name.endswith(".pyc")]


def test_the_loss_needs_torch_alone(dist: Path, tmp_path: Path) -> None:
    """From the wheel, where neither NeMo nor megatron-core is installed."""
    (wheel,) = dist.glob("*.whl")
    done = torch_alone(tmp_path, "-c", USE, str(wheel))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["nemo_kd-wheel", "finite"]


def test_without_typer_the_command_says_what_to_install(dist: Path, tmp_path: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    run = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); from nemo_kd.cli.main import main; main()"
    )
    done = torch_alone(tmp_path, "-c", run, str(wheel))
    assert done.returncode == 1 and done.stderr.startswith("error: ")
    assert "pip install typer rich" in done.stderr


USE = """
import importlib.util, sys
sys.path.insert(0, sys.argv[1])
assert importlib.util.find_spec("nemo") is importlib.util.find_spec("megatron") is None
import torch
import nemo_kd.loss as loss
z, t, labels = torch.randn(7, 33, requires_grad=True), torch.randn(7, 33), torch.arange(7)
kd = loss.sft_kd_loss(z, labels, loss.vocab_parallel_topk(t, 5), loss.KDConfig())
kd.loss.sum().backward()
print("nemo_kd-wheel" if ".whl" in loss.__file__ else loss.__file__)
print("finite" if z.grad.isfinite().all() else "not finite")
"""
