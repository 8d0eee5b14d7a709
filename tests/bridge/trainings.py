"""Trainings by `examples/bridge/train.py`: their options, and the losses that Bridge printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_kd.store import Store
from tests.bridge import loop
from tests.conftest import ROOT

TRAIN = str(ROOT / "examples/bridge/train.py")
HALF = loop.STEPS // 2
PRINTED = 5e-6  # Bridge prints seven digits of losses below 10
Line = dict[str, float]


def options(data: Path, output: Path) -> list[str]:
    return [
        f"{data}/student",
        f"--store={data}/train",
        f"--valid={data}/held",
        f"--output={output}",
        "--precision=32",
        f"--alpha={loop.ALPHA}",
        f"--alpha-end={loop.ALPHA_END}",
        f"--seq-length={loop.SEQ_LENGTH}",
        f"--global-batch-size={loop.GLOBAL_BATCH}",
        f"--micro-batch-size={loop.MICRO_BATCH}",
        f"--steps={loop.STEPS}",
        f"--seed={loop.SEED}",
        f"--lr={loop.LR}",
        "--warmup=0",
        f"--eval-interval={HALF}",
        f"--save-interval={HALF}",
    ]


def steps(stdout: str) -> list[Line]:
    """The losses that Bridge printed of each step."""
    lines = [line for line in stdout.splitlines() if re.search(r"\] iteration +\d+/", line)]
    return [_values(r"(\w*loss): ([\d.E+-]+)", line) for line in lines]


def evaluations(stdout: str) -> list[Line]:
    """The metrics that Bridge printed of each evaluation."""
    lines = [line for line in stdout.splitlines() if "validation loss at iteration" in line]
    return [_values(r"(\w+) value: ([\d.E+-]+)", line) for line in lines]


def _values(pattern: str, line: str) -> Line:
    return {name: float(value) for name, value in re.findall(pattern, line)}


def assert_equal(found: list[Line], expected: list[Line], tolerance: float) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, abs=tolerance)


def transformers_loss(student: Path, held: Path) -> float:
    """The mean cross-entropy per answer token of a store's samples, in float64."""
    model = AutoModelForCausalLM.from_pretrained(
        student, local_files_only=True, trust_remote_code=False
    ).double()
    store, losses = Store(held), []
    for one in store:
        ids = torch.tensor(one.input_ids).long()
        logits = model(ids[None]).logits[0, :, : store.spec.vocab_size]
        positions = torch.tensor(one.answer_positions())
        losses.append(
            torch.nn.functional.cross_entropy(
                logits[positions - 1], ids[positions], reduction="none"
            )
        )
    return float(torch.cat(losses).detach().mean())
