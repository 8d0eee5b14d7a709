"""What a training run logged, and how far two runs may differ."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

Line = dict[str, Any]

# The tolerances of losses in nats, and of gradient norms, which are about 1 in these runs.
#
# Another layout or a fused LM head adds the same float32 numbers in another order, and AdamW
# carries the difference from step to step: 4e-6 after 20 steps in benchmarks/results/layouts.json.
# The tests assert that other weights, tokens or samples change a loss by more than 1e-3.
LAYOUT = 1e-4
# One model cut into other micro-batches or packs: fewer sums change their order, 1e-6 in that file.
# NeMo's own normalization, the mistake that could be made here, changes a loss by more than 1e-4.
SPLIT = 1e-5
# Equations between numbers of one log line, each a float32 mean of its own: two roundings of a loss
# below 10 nats, 1e-6.
SAME_LINE = 1e-5


def metrics(run: Path) -> list[Line]:
    """The lines of `metrics.jsonl` in the directory of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps(run: Path) -> list[Line]:
    """The lines of training steps with an answer token."""
    return [line for line in metrics(run) if "sft_loss" in line]


def validations(run: Path) -> list[Line]:
    """The lines of validations on the held-out store."""
    return [line for line in metrics(run) if "val/heldout/sft_loss" in line]


def assert_close(
    one: Sequence[Line],
    other: Sequence[Line],
    names: Iterable[str],
    *,
    abs: float,
    rel: float | None = None,
) -> None:
    """Line by line, `names` differ by at most `abs`, or by `rel` of the second if that is more."""
    for a, b in zip(one, other, strict=True):
        for name in names:
            assert a[name] == pytest.approx(b[name], abs=abs, rel=rel), (a["step"], name)
