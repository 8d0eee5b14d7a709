"""What is shipped: a wheel with the package and its configurations, and a source distribution."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import nemo_kd
from nemo_kd.cli.jobs import JOBS
from tests.bare import extra, run_bare
from tests.conftest import ROOT

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
    conf = {f"nemo_kd/conf/{path.name}" for path in (ROOT / "conf").glob("*.yaml")}
    assert package | conf | {"nemo_kd/py.typed", "nemo_kd/checkpoints/sample.txt"} == {
        n for n in names if not n.split("/")[0].endswith("info")
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)
    metadata = next(name for name in names if name.endswith("METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    required = [line for line in text.splitlines() if line.startswith("Requires-Dist")]
    always = [line for line in required if "extra ==" not in line]
    assert always == ["Requires-Dist: torch>=2.3"]


def test_the_source_distribution_is_enough_to_work_from(dist: Path) -> None:
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    wanted = ["conf/train_gpt_sft_kd.yaml", "examples/train_gpt_sft_kd.py", "tests/conftest.py"]
    wanted += ["LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "constraints.txt"]
    assert set(wanted) <= names
    assert not [name for name in names if name.endswith(".pyc")]


def in_wheel(dist: Path, tmp_path: Path, name: str | None, code: str, *arguments: str) -> str:
    """What `code` prints with the wheel and the packages of one extra; it must succeed."""
    (wheel,) = dist.glob("*.whl")
    installed = tmp_path / "nemo-kd"
    zipfile.ZipFile(wheel).extractall(installed)
    start = f"import sys; sys.path.insert(0, {str(installed)!r})\n"
    done = run_bare(tmp_path / "bare", extra(name), "-c", start + code, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_loss_needs_only_torch(dist: Path, tmp_path: Path) -> None:
    assert in_wheel(dist, tmp_path, None, USE).split() == ["finite"]


def test_without_an_extra_the_command_starts_and_says_what_it_needs(
    dist: Path, tmp_path: Path
) -> None:
    code = "from nemo_kd.cli.main import main\ntry: main()\nexcept SystemExit as end: print(end)"
    said = in_wheel(dist, tmp_path, None, code, "inspect", "store")
    assert said.startswith("error: ") and "pip install 'nemo-kd[cli]'" in said


def test_a_store_is_written_and_read_with_its_extra(dist: Path, tmp_path: Path) -> None:
    assert in_wheel(dist, tmp_path, "store", STORE, str(tmp_path / "store")).split() == ["3", "7"]


def test_the_command_works_with_its_extra(dist: Path, tmp_path: Path) -> None:
    code = "from nemo_kd.cli.main import main; main()"
    in_wheel(dist, tmp_path, "store", STORE, str(tmp_path / "store"))
    shutil.rmtree(tmp_path / "bare")
    said = in_wheel(dist, tmp_path, "cli", code, "inspect", str(tmp_path / "store"))
    assert "samples" in said


@pytest.mark.parametrize("job", ["dump", "generate", "train", "evaluate", "merge-lora"])
def test_an_installed_package_has_the_jobs_and_their_configurations(
    dist: Path, tmp_path: Path, job: str
) -> None:
    """The help of the package's own job is the script's."""
    code = "from nemo_kd.cli.main import main; main()"
    said = in_wheel(dist, tmp_path, "cli", code, job, "--help")
    script = JOBS[job].config_name
    with_script = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{script}.py"), "--help"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert said == with_script.stdout and "Examples:" in said


USE = """
import importlib.util
assert importlib.util.find_spec("nemo") is importlib.util.find_spec("megatron") is None
import torch
import nemo_kd.loss as loss
z, t, labels = torch.randn(7, 33, requires_grad=True), torch.randn(7, 33), torch.arange(7)
kd = loss.sft_kd_loss(z, labels, loss.vocab_parallel_topk(t, 5), loss.KDConfig())
kd.loss.sum().backward()
print("finite" if z.grad.isfinite().all() else "not finite")
"""
STORE = """
import numpy, sys
from nemo_kd.store import Sample, Store, StoreSpec, StoreWriter
from nemo_kd.topk import TopK
topk = TopK(
    ids=numpy.array([[7, 3]]),
    logits=numpy.array([[2.0, 1.0]], numpy.float32),
    logsumexp=numpy.array([[2.5]], numpy.float32),
)
tokens, mask = numpy.array([5, 6, 7], numpy.int32), numpy.array([0, 0, 1], numpy.uint8)
writer = StoreWriter(sys.argv[1], StoreSpec(top_k=2, vocab_size=9), overwrite=True)
with writer.shard(0) as shard:
    shard.add(Sample(row=0, input_ids=tokens, loss_mask=mask, topk=topk))
writer.finish(1)
sample = Store(sys.argv[1])[0]
print(len(sample.input_ids), int(sample.topk.ids[0, 0]))
"""
