"""What is shipped: a wheel with the package and its configurations, and a source distribution."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

import pytest

import nemo_kd
from nemo_kd.cli.jobs import JOBS
from nemo_kd.extras import install
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


def sent_to_docker(paths: Iterable[str]) -> set[str]:
    """The paths that are not left out by .dockerignore, whose last rule that applies decides."""
    sent = set()
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    for path in paths:
        above = [path, *map(str, Path(path).parents)]
        out = False
        for rule in rules:
            pattern = rule.removeprefix("!").removeprefix("**/")
            names = [Path(each).name for each in above] if "**/" in rule else above
            if any(fnmatch(name, pattern) for name in names):
                out = not rule.startswith("!")
        if not out:
            sent.add(path)
    return sent


def test_the_images_get_what_they_install_and_run_and_no_files_of_the_user(
    dist: Path, tmp_path: Path
) -> None:
    """COPY . . would copy models and data into an image that is pushed to a registry."""
    own = ["teacher.nemo", "data/train.jsonl", "stores/kd/tokens.bin", "runs/kd/kd.nemo", ".env"]
    own += ["outputs/demo/x", "examples/teacher.nemo", "train.jsonl", "examples/demo/outputs/x"]
    assert not sent_to_docker(own)
    files = [path for path in dist.parent.rglob("*") if path.is_file()]
    sent = sent_to_docker(str(path.relative_to(dist.parent)) for path in files)
    assert {"constraints.txt", "examples/demo/run.py", "examples/dump_teacher_topk.py"} <= sent
    assert {path.split("/")[0] for path in sent} == {
        *("LICENSE", "README.md", "constraints.txt", "pyproject.toml", "setup.py"),
        *("conf", "examples", "nemo_kd"),
    }
    for path in sent:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    done = subprocess.run(
        [sys.executable, "-c", "from setuptools import build_meta as b; b.build_wheel('dist')"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    (whole,) = dist.glob("*.whl")
    assert set(zipfile.ZipFile(wheel).namelist()) == set(zipfile.ZipFile(whole).namelist())


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
    assert said.startswith("error: ") and "pip install '.[cli]' in a checkout of nemo-kd" in said


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


def test_messages_name_extras_that_exist_by_the_command_that_installs_them() -> None:
    """The package is on no index: `pip install nemo-kd[x]` would find nothing, or another one."""
    extras = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    )
    assert install("remote", "gcsfs") == "pip install '.[remote]' gcsfs in a checkout of nemo-kd"
    for path in (ROOT / "nemo_kd").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"pip install [^\n]*nemo-kd\[", text), path
        named = re.findall(r"\binstall\([\"'](\w+)[\"']", text)
        named += re.findall(r"pip install [^\n]*?'\.\[([\w,]+)\]'", text)
        assert {each for found in named for each in found.split(",")} <= extras, path
