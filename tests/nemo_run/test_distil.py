"""examples/nemo_run by NeMo-Run itself, in an environment of its own: both steps on this machine,
and the jobs that it would give to SLURM."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nemo_kd.store import Store
from tests.conftest import ROOT, Shared
from tests.processes import environment
from tests.runs import metrics

pytestmark = pytest.mark.slow

PACKAGES = ("nemo_run==0.11.1", "leptonai==0.26.6")
TRAIN = (
    "trainer.precision=32",
    "trainer.max_steps=3",
    "trainer.val_check_interval=3",
    "model.global_batch_size=4",
    "model.micro_batch_size=2",
    "model.data.train_ds.max_seq_length=128",
    "model.tensor_model_parallel_size=2",
    "+model.kd.alpha=0.5",
)
DUMP = ("data.max_seq_length=128", "trainer.precision=32", "dump.top_k=20")


@pytest.fixture(scope="module")
def launcher(shared: Shared) -> Path:
    """The interpreter of an environment that has NeMo-Run and no NeMo."""

    def make(directory: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", directory / "venv"], check=True)
        pip = [str(directory / "venv/bin/python"), "-m", "pip", "install", "--quiet", *PACKAGES]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{' '.join(PACKAGES)} cannot be installed: {done.stderr[-500:]}")

    return shared("nemo_run", make) / "venv/bin/python"


def distil(launcher: Path, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in environment().items() if k != "PYTHONPATH"}
    return subprocess.run(
        [launcher, ROOT / "examples/nemo_run/distil.py", *arguments],
        env={**inherited, "NEMORUN_HOME": str(home), "COLUMNS": "200"},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=400,
    )


def each(option: str, values: tuple[str, ...]) -> list[str]:
    return [word for value in values for word in (f"--{option}", value)]


def test_dump_and_training_on_this_machine(launcher: Path, tiny: Path, tmp_path: Path) -> None:
    arguments = [
        *("local", "--devices", "2", "--python", sys.executable),
        *("--teacher", f"{tiny}/teacher.nemo", "--student", f"{tiny}/student.nemo"),
        *("--data", f"{tiny}/train.jsonl", "--store", "store", "--run", "run"),
        *each("dump", DUMP),
        *each("train", TRAIN),
    ]
    done = distil(launcher, tmp_path, *arguments)
    assert not done.returncode, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(Store(tmp_path / "store")) == len((tiny / "train.jsonl").read_text().splitlines())
    steps = [line["step"] for line in metrics(tmp_path / "run") if "kd_loss" in line]
    assert steps == [1, 2, 3]
    assert (tmp_path / "run/checkpoints/kd.nemo").is_file()


def test_a_dump_that_fails_ends_the_experiment_with_an_error(
    launcher: Path, tiny: Path, tmp_path: Path
) -> None:
    arguments = [
        *("local", "--python", sys.executable, "--teacher", f"{tiny}/teacher.nemo"),
        *("--student", f"{tiny}/student.nemo", "--data", "absent.jsonl"),
        *("--store", "store", "--run", "run"),
    ]
    done = distil(launcher, tmp_path, *arguments)
    assert done.returncode and "absent.jsonl" in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()


def test_the_jobs_for_slurm(launcher: Path, tmp_path: Path) -> None:
    """Their commands are not printed; tests/distribution composes those of the page."""
    paths = {name: f"/lustre/{name}" for name in ("teacher", "student", "data", "store", "run")}
    paths["run"] = str(tmp_path / "run")
    arguments = [word for name, path in paths.items() for word in (f"--{name}", path)]
    done = distil(launcher, tmp_path, "slurm", "--dry-run", "--nodes", "2", *arguments)
    assert not done.returncode, done.stderr
    printed = " ".join(done.stdout.split())
    for words in (
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=8",
        "--container-image nvcr.io#nvidia/nemo:25.07",
        "export MASTER_ADDR=",
    ):
        assert printed.count(words) == 2, words


def test_relative_paths_are_refused_for_slurm(launcher: Path, tmp_path: Path) -> None:
    names = ("teacher", "student", "data", "store", "run")
    done = distil(launcher, tmp_path, "slurm", *(f"--{name}=here" for name in names))
    assert done.returncode == 2 and "must be an absolute path" in done.stderr
