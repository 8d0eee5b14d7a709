"""A fused LM head waits for its overlapped all-gather, as a separate one does: see `overlap.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Shared
from tests.processes import run_program


@pytest.fixture(scope="module")
def found(shared: Shared) -> dict[str, Any]:
    def make(directory: Path) -> None:
        run_program("tests/layouts/overlap.py", directory / "found.json", fork=True)

    return dict(json.loads((shared("overlap", make) / "found.json").read_text()))


def test_a_fused_lm_head_waits_for_the_all_gather_of_its_weight(found: dict[str, Any]) -> None:
    fused, separate = found["fused"], found["separate"]
    assert fused["unfinished"] == separate["unfinished"] == 0
    # Float32 sums in another order; Adam's steps of 1e-2 from gradients that agree to 1e-8.
    assert fused["losses"] == pytest.approx(separate["losses"], rel=1e-5)
    assert fused["weight"] == pytest.approx(separate["weight"], abs=1e-4)


def test_a_deferred_gradient_of_the_lm_head_is_refused_beside_a_fused_one(
    found: dict[str, Any],
) -> None:
    separate, fused = found["deferred"]
    assert separate == ""
    assert fused.startswith("model.defer_embedding_wgrad_compute=true with model.kd.fused_lm_head")
