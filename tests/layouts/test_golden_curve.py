"""Twenty seeded steps whose losses are committed: a change that moves them must say so.

To write them anew: `python -m tests.layouts.test_golden_curve`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

from tests.processes import run_program, run_script
from tests.runs import metrics

GOLDEN = Path(__file__).with_name("golden_curve.json")
NAMES = ("loss", "sft_loss", "kd_loss", "grad_norm")
# Without vector instructions (ATEN_CPU_CAPABILITY=default, SSE4.2 alone) the losses differ by 8e-7;
# a changed formula, seed or order of samples moves them by 1e-3 and more.
RELATIVE = 2e-5


def curve(directory: Path) -> list[dict[str, float]]:
    run_program("tests/layouts/golden.py", directory, fork=True)
    run_script(
        "train_gpt_sft_kd.py",
        f"model.restore_from_path={directory}/student.nemo",
        f"model.data.train_ds.store={directory}/store",
        f"exp_manager.explicit_log_dir={directory}/run",
        "exp_manager.checkpoint_callback_params.save_top_k=0",
        "exp_manager.create_tensorboard_logger=false",
        "trainer.precision=32",
        "trainer.max_steps=20",
        "trainer.val_check_interval=20",
        "trainer.enable_progress_bar=false",
        "model.global_batch_size=8",
        "model.micro_batch_size=4",
        "model.data.train_ds.max_seq_length=32",
        "model.optim.lr=0.01",
        "model.optim.sched.warmup_steps=3",
        "+model.kd.alpha=0.7",
    )
    return [{name: step[name] for name in NAMES} for step in metrics(directory / "run")]


def test_twenty_steps_have_the_committed_losses(tmp_path: Path) -> None:
    steps, golden = curve(tmp_path), json.loads(GOLDEN.read_text())
    assert len(steps) == len(golden) == 20
    for step, expected in zip(steps, golden, strict=True):
        assert step == pytest.approx(expected, rel=RELATIVE)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        steps = curve(Path(made))
        GOLDEN.write_text("[\n" + ",\n".join(json.dumps(step) for step in steps) + "\n]\n")
