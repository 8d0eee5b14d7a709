"""Dumps and training runs of the tiny models, one a layout, shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.conftest import Script, program

TENSOR, PIPELINE = "model.tensor_model_parallel_size", "model.pipeline_model_parallel_size"
# name → (processes, overrides)
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "tp2": (2, [f"{TENSOR}=2"]),
    "tp2sp": (2, [f"{TENSOR}=2", "model.sequence_parallel=true"]),
    "pp2": (2, [f"{PIPELINE}=2"]),
    "dp2": (2, []),
    "tp4": (4, [f"{TENSOR}=4"]),
    "tp2pp2": (4, [f"{TENSOR}=2", f"{PIPELINE}=2"]),
}


def dump_overrides(tiny: Path, split: str, directory: Path) -> list[str]:
    return [
        f"model.restore_from_path={tiny}/teacher.nemo",
        f"data.file_path={tiny}/{split}.jsonl",
        f"output_dir={directory}",
        "data.max_seq_length=128",
        "trainer.precision=32",
        "model.micro_batch_size=3",
        "rows_per_shard=10",
        "rows_per_lm_head=50",
        "+model.kd.top_k=20",
        "model.kd.temperatures=[1.0,2.0]",
    ]


@pytest.fixture(scope="session")
def dense(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, NDArray[Any]]:
    """The teacher's whole distribution over the first rows: see `dense.py`."""
    path = tmp_path_factory.mktemp("dense") / "dense.npz"
    program("tests/layouts/dense.py", tiny, path)
    return dict(np.load(path))


def train_overrides(tiny: Path, store: Path, heldout: Path, directory: Path) -> list[str]:
    return [
        f"model.restore_from_path={tiny}/student.nemo",
        f"model.data.train_ds.store={store}",
        f"model.data.validation_ds.store={heldout}",
        "model.data.validation_ds.names=[heldout]",
        f"exp_manager.explicit_log_dir={directory}",
        "trainer.precision=32",
        "trainer.max_steps=6",
        "trainer.val_check_interval=3",
        "trainer.enable_progress_bar=false",
        "model.global_batch_size=4",
        "model.micro_batch_size=1",
        "model.data.train_ds.max_seq_length=128",
        "model.optim.lr=0.01",
        "model.optim.sched.warmup_steps=2",
    ]


@pytest.fixture(scope="session")
def dump(
    tiny: Path, script: Script, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """dump(layout, split) → directory of the store, made at the first call."""
    made: dict[tuple[str, str], Path] = {}

    def get(layout: str = "one", split: str = "train") -> Path:
        if (layout, split) not in made:
            directory = tmp_path_factory.mktemp(f"dump-{layout}-{split}") / "store"
            processes, overrides = LAYOUTS[layout]
            base = dump_overrides(tiny, split, directory)
            done = script("dump_teacher_topk.py", *base, *overrides, processes=processes)
            (directory.parent / "stdout.txt").write_text(done.stdout)
            (directory.parent / "stderr.txt").write_text(done.stderr)
            made[layout, split] = directory
        return made[layout, split]

    return get


@pytest.fixture(scope="session")
def train(
    tiny: Path,
    dump: Callable[..., Path],
    script: Script,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    """train(layout, *overrides) → the run's directory, with metrics.jsonl and checkpoints."""
    made: dict[tuple[str, ...], Path] = {}

    def get(layout: str = "one", *more: str) -> Path:
        key = (layout, *more)
        if key not in made:
            directory = tmp_path_factory.mktemp(f"train-{layout}")
            processes, overrides = LAYOUTS[layout]
            stores = dump(), dump(split="heldout")
            base = train_overrides(tiny, *stores, directory)
            done = script("train_gpt_sft_kd.py", *base, *overrides, *more, processes=processes)
            made[key] = directory
            (directory / "stderr.txt").write_text(done.stderr)
        return made[key]

    return get
