"""Training: the same losses on every layout, NeMo's own without a KD term."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import metrics

STEP_METRICS = (
    "loss",
    "sft_loss",
    "kd_loss",
    "teacher_mass",
    "student_mass",
    "top1_agreement",
    "tokens_per_s",
)


def steps(directory: Path) -> list[dict[str, Any]]:
    return [line for line in metrics(directory) if "sft_loss" in line]


def validations(directory: Path) -> list[dict[str, Any]]:
    return [line for line in metrics(directory) if "val/heldout/sft_loss" in line]


def test_every_step_logs_all_metrics(train: Callable[..., Path]) -> None:
    lines = steps(train())
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert set(STEP_METRICS) <= set(line)
        assert line["loss"] == pytest.approx(0.5 * line["sft_loss"] + 0.5 * line["kd_loss"])
        assert 0 < line["teacher_mass"] < 1 and 0 < line["student_mass"] < 1


def test_training_lowers_both_losses_on_held_out_data(train: Callable[..., Path]) -> None:
    first, last = validations(train("one", "+model.kd.alpha=0.9"))
    assert last["val/heldout/sft_loss"] < first["val/heldout/sft_loss"]
    assert last["val/heldout/kd_loss"] < first["val/heldout/kd_loss"]


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2", "tp2pp2"])
def test_layouts_agree(train: Callable[..., Path], layout: str) -> None:
    one, other = train(), train(layout)
    for a, b in zip(steps(one), steps(other), strict=True):
        for name in STEP_METRICS[:-1]:
            assert a[name] == pytest.approx(b[name], abs=1e-4), (a["step"], name)
    for a, b in zip(validations(one), validations(other), strict=True):
        for name in a:
            if name.startswith("val/"):
                assert a[name] == pytest.approx(b[name], abs=1e-4), (a["step"], name)


def test_alpha_zero_is_nemos_own_sft_bit_for_bit(
    train: Callable[..., Path], tiny: Path, tmp_path: Path
) -> None:
    """NeMo's own class, on the JSONL; ours with alpha 0, on the store."""
    ours = steps(train("one", "+model.kd.alpha=0", "++model.kd.count_padding=true"))
    nemo = nemo_sft(tiny, tmp_path)
    assert [line["reduced_train_loss"] for line in ours] == nemo


def nemo_sft(tiny: Path, directory: Path) -> list[float]:
    """The same six steps by `MegatronGPTSFTModel` itself, in a process of its own."""
    import json
    import subprocess

    from tests.conftest import ROOT, environment

    program = ROOT / "tests/layouts/nemo_sft.py"
    done = subprocess.run(
        [sys.executable, str(program), str(tiny), str(directory)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((directory / "losses.json").read_text())
