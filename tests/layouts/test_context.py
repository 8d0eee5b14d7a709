"""Context parallelism up to the attention, in real processes: see `context.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.processes import run_program


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_loss_gradient_and_metrics_over_nemos_own_cut_are_those_of_the_whole(
    tmp_path: Path, ranks: int
) -> None:
    run_program("tests/layouts/context.py", tmp_path / "found.json", processes=ranks, fork=True)
    found = json.loads((tmp_path / "found.json").read_text())
    # Float32 sums of 100 tokens, in nats below 10, in another order; a gradient of at most 1e-2.
    assert found["loss"] < 1e-6 and found["gradient"] < 1e-7 < 1e-3 < found["largest_gradient"]
    assert len(found["metrics"]) > 8
    for name, difference in found["metrics"].items():
        assert difference < 1e-6, name
