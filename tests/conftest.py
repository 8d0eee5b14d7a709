"""Fixtures of the whole suite: the tiny model world, and the product's scripts as processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.loss.ranks import Ranks

ROOT = Path(__file__).parent.parent
Script = Callable[..., subprocess.CompletedProcess[str]]
Shared = Callable[[str, Callable[[Path], None]], Path]


def run_script(
    name: str, *overrides: str, processes: int = 1, fails: bool = False, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run `examples/NAME` on `processes` ranks under torchrun; a failure shows its output."""
    launcher = [sys.executable]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone"]
        launcher += [*torchrun, f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*launcher, str(ROOT / "examples" / name), *overrides],
        env={**environment(), **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if (done.returncode != 0) != fails:
        raise AssertionError(done.stdout[-4000:] + done.stderr[-8000:])
    return done


@pytest.fixture(scope="session")
def script() -> Script:
    """`run_script`."""
    return run_script


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Shared:
    """shared(name, make) → the directory that `make` filled, once for all of pytest's workers."""
    root = tmp_path_factory.getbasetemp()
    root = (root if worker_id == "master" else root.parent) / "shared"
    root.mkdir(exist_ok=True)

    def get(name: str, make: Callable[[Path], None]) -> Path:
        directory, done = root / name, root / f"{name}.done"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(directory, ignore_errors=True)  # of a worker that failed
                directory.mkdir()
                make(directory)
                done.touch()
        return directory

    return get


@pytest.fixture(scope="session")
def tiny(shared: Shared, script: Script) -> Path:
    """teacher.nemo, student.nemo, train.jsonl, heldout.jsonl of `tests/tiny.py`."""
    return shared("tiny", lambda directory: make_tiny(directory, script))


def make_tiny(directory: Path, script: Script) -> None:
    """The teacher is fine-tuned by the product's own script: plain SFT on the JSONL."""
    program("tests/tiny.py", directory)
    script(
        "train_gpt_sft_kd.py",
        "name=teacher",
        f"model.restore_from_path={directory}/untrained.nemo",
        f"model.data.train_ds.file_names=[{directory}/train.jsonl]",
        "model.data.train_ds.concat_sampling_probabilities=[1.0]",
        "model.data.train_ds.max_seq_length=128",
        f"exp_manager.explicit_log_dir={directory}/teacher",
        "exp_manager.checkpoint_callback_params.save_top_k=0",
        "trainer.precision=32",
        "trainer.max_steps=80",
        "trainer.val_check_interval=80",
        "trainer.enable_progress_bar=false",
        "model.global_batch_size=8",
        "model.micro_batch_size=8",
        "model.optim.lr=0.01",
        "model.optim.sched.warmup_steps=5",
        "model.kd.alpha=0",
    )
    (directory / "teacher/checkpoints/teacher.nemo").rename(directory / "teacher.nemo")


@pytest.fixture(scope="module")
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """`request.param` processes for checks in a gloo group: parametrize with `indirect=True`."""
    with Ranks(request.param) as started:
        yield started


def program(path: str, *arguments: object) -> None:
    """Run a helper of the tests in a process of its own: it patches torch for the CPU."""
    done = subprocess.run(
        [sys.executable, str(ROOT / path), *map(str, arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def environment() -> dict[str, str]:
    bin_directory = str(Path(sys.executable).parent)
    path = bin_directory + os.pathsep + os.environ["PATH"]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, "NEMO_KD_TRACEBACK": "1"}


def metrics(run_directory: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`."""
    text = (run_directory / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]
