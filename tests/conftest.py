"""Fixtures of the whole suite: the tiny model world, and the product's scripts as processes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from filelock import FileLock

from tests.loss.ranks import Ranks
from tests.processes import ROOT as ROOT
from tests.processes import run_program, run_script

Script = Callable[..., subprocess.CompletedProcess[str]]
Shared = Callable[[str, Callable[[Path], object]], Path]

LONG = ("checkpoints", "layouts", "teacher", "hf", "cli")
"""Folders whose tests begin, so that no worker is left with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as `nemo` the tests whose fixtures start a process group or NeMo; sort by `LONG`."""
    items.sort(key=lambda item: (*LONG, item.path.parent.name).index(item.path.parent.name))
    for item in items:
        if {"nemo", "ranks", "shared"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("nemo")


@pytest.fixture(autouse=True)
def _no_group_where_nemo_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under `make test-unit` a process group in this process fails the test."""
    if "torch" in sys.modules and find_spec("nemo") is None:

        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("a process group in a unit test: mark it `nemo`")

        monkeypatch.setattr("torch.distributed.init_process_group", refuse)


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

    def get(name: str, make: Callable[[Path], object]) -> Path:
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
def tiny(shared: Shared) -> Path:
    """teacher.nemo, student.nemo, train.jsonl, heldout.jsonl of `tests/tiny.py`."""
    return shared("tiny", lambda directory: make_tiny(directory))


def make_tiny(directory: Path) -> None:
    """The teacher is fine-tuned by the product's own script: plain SFT on the JSONL."""
    run_program("tests/tiny.py", directory, fork=True)
    run_script(
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
