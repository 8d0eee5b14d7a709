"""Dumps and training runs of the tiny models, one a layout, shared by the tests of this folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.conftest import Shared
from tests.processes import run_program, run_script

TENSOR, PIPELINE = "model.tensor_model_parallel_size", "model.pipeline_model_parallel_size"
# name → (processes, overrides)
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "tp2": (2, [f"{TENSOR}=2"]),
    "tp2sp": (2, [f"{TENSOR}=2", "model.sequence_parallel=true"]),
    "pp2": (2, [f"{PIPELINE}=2"]),
    "dp2": (2, []),
    "dp2dist": (2, ["model.optim.name=mcore_distributed_optim"]),  # Adam's state cut over DP
    "tp4": (4, [f"{TENSOR}=4"]),
    "pp4": (4, [f"{PIPELINE}=4"]),
    "tp2pp2": (4, [f"{TENSOR}=2", f"{PIPELINE}=2"]),
}

FUSED = "+model.kd.fused_lm_head=true"
SELDOM = "trainer.log_every_n_steps=4"
SIX_STEPS = [
    "trainer.precision=32",
    "trainer.max_steps=6",
    "trainer.val_check_interval=3",
    "trainer.enable_progress_bar=false",
    "trainer.log_every_n_steps=1",
    "model.global_batch_size=4",
    "model.micro_batch_size=1",
    "model.data.train_ds.max_seq_length=128",
    "model.optim.lr=0.01",
    "model.optim.sched.warmup_steps=2",
]


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
        "dump.top_k=20",
        "dump.temperatures=[1.0,2.0]",
    ]


@pytest.fixture(scope="session")
def dense(tiny: Path, shared: Shared) -> dict[str, NDArray[Any]]:
    """The teacher's whole distribution over the first rows: see `dense.py`."""

    def make(path: Path) -> None:
        run_program("tests/layouts/dense.py", tiny, path / "dense.npz", fork=True)

    made = shared("dense", make)
    return dict(np.load(made / "dense.npz"))


def train_overrides(
    tiny: Path, store: Path | str, heldout: Path | str, directory: Path
) -> list[str]:
    return [
        f"model.restore_from_path={tiny}/student.nemo",
        f"model.data.train_ds.store={store}",
        f"model.data.validation_ds.store={heldout}",
        "model.data.validation_ds.names=[heldout]",
        f"exp_manager.explicit_log_dir={directory}",
        *SIX_STEPS,
    ]


@pytest.fixture(scope="session")
def dump(tiny: Path, shared: Shared) -> Callable[..., Path]:
    """dump(layout, split) → directory of the store, made at the first call."""

    def get(layout: str = "one", split: str = "train") -> Path:
        processes, overrides = LAYOUTS[layout]

        def make(directory: Path) -> None:
            base = dump_overrides(tiny, split, directory / "store")
            done = run_script("dump_teacher_topk.py", *base, *overrides, processes=processes)
            (directory / "stdout.txt").write_text(done.stdout)
            (directory / "stderr.txt").write_text(done.stderr)

        return shared(f"dump-{layout}-{split}", make) / "store"

    return get


@pytest.fixture(scope="session")
def train(tiny: Path, dump: Callable[..., Path], shared: Shared) -> Callable[..., Path]:
    """train(layout, *overrides) → the run's directory, with metrics.jsonl and checkpoints."""

    def get(layout: str = "one", *more: str) -> Path:
        processes, overrides = LAYOUTS[layout]
        stores = dump(), dump(split="heldout")

        def make(directory: Path) -> None:
            base = train_overrides(tiny, *stores, directory)
            overridden = [*base, *overrides, *more]
            fork = layout != "dp2"  # one that torchrun starts
            done = run_script("train_gpt_sft_kd.py", *overridden, processes=processes, fork=fork)
            (directory / "stderr.txt").write_text(done.stderr)

        name = hashlib.sha256(" ".join(more).encode()).hexdigest()[:12]
        return shared(f"train-{layout}-{name}", make)

    return get
