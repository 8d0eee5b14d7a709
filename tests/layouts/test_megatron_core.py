"""The example without NeMo: Megatron-core's own loop on a store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_kd.loss import KDConfig
from tests.processes import run_program
from tests.runs import LAYOUT

EXAMPLE = "examples/megatron_core/train.py"
# The example prints four decimals; and see `LAYOUT`.
PRINTED = LAYOUT


def losses(
    store: Path,
    *options: str,
    processes: int = 1,
    steps: int = 6,
    program: str = EXAMPLE,
) -> list[dict[str, float]]:
    done = run_program(
        program,
        f"--store={store}",
        f"--steps={steps}",
        "--lr=0.01",
        *options,
        processes=processes,
    )
    assert "UserWarning" not in done.stderr
    lines = [line.split(": ")[1] for line in done.stdout.splitlines() if line.startswith("step ")]
    pairs = [[part.rsplit(" ", 1) for part in line.split(", ")] for line in lines]
    assert len(pairs) == steps
    return [{name: float(value) for name, value in line} for line in pairs]


def test_data_parallel_ranks_train_as_one_process(dump: Callable[..., Path]) -> None:
    """With other micro-batches too: every answer token of the global batch weighs alike."""
    one = losses(dump())
    two = losses(dump(), "--micro-batch-size=1", processes=2)
    sft, kd = KDConfig().weights
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, abs=PRINTED)
        assert a["loss"] == pytest.approx(sft * a["sft_loss"] + kd * a["kd_loss"], abs=PRINTED)
    assert one[-1]["kd_loss"] < one[0]["kd_loss"] and one[-1]["sft_loss"] < one[0]["sft_loss"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "options"),
    [
        (2, ["--tensor-parallel=2", "--sequence-parallel"]),
        (2, ["--pipeline-parallel=2"]),
        (4, ["--tensor-parallel=2", "--pipeline-parallel=2"]),
    ],
)
def test_other_layouts_learn(dump: Callable[..., Path], processes: int, options: list[str]) -> None:
    """Their random weights are others, so that their losses are too."""
    lines = losses(dump(), *options, processes=processes, steps=12)
    assert lines[-1]["kd_loss"] < lines[0]["kd_loss"] - 0.3
    assert lines[-1]["sft_loss"] < lines[0]["sft_loss"] - 0.3


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2])
def test_pipelines_train_as_one_process(dump: Callable[..., Path], parts: int) -> None:
    """From the same weights; interleaved, each loss must meet its own micro-batch's teacher."""
    options = ["--micro-batch-size=1", "--global-batch-size=8"]
    program = "tests/layouts/interleaved.py"
    one = losses(dump(), *options, program=program)
    cut = [*options, "--pipeline-parallel=2", f"--virtual-pipeline={parts}"]
    other = losses(dump(), *cut, processes=2, program=program)
    for a, b in zip(one, other, strict=True):
        assert a == pytest.approx(b, abs=PRINTED)
    assert one[-1]["kd_loss"] < one[0]["kd_loss"] - 0.3
