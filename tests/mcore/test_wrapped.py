"""Teachers and students in Megatron's `Float16Module`: see `wrapped.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Shared
from tests.processes import run_program


@pytest.fixture(scope="module")
def found(shared: Shared) -> dict[str, Any]:
    def run(path: Path) -> None:
        done = run_program("tests/mcore/wrapped.py", path, fork=True)
        (path / "found.json").write_text(done.stdout.splitlines()[-1])

    result: dict[str, Any] = json.loads((shared("wrapped", run) / "found.json").read_text())
    return result


@pytest.mark.parametrize("head", ["untied", "tied"])
def test_a_wrapped_teacher_has_the_logits_and_answers_of_the_bare_one(
    found: dict[str, Any], head: str
) -> None:
    for bare, wrapped in found[head].values():
        assert bare == wrapped


def test_the_loss_gets_the_logits_of_the_output_layer_themselves(found: dict[str, Any]) -> None:
    """Neither a copy in float32 nor a transposed one."""
    assert found["seen"]["loss"] == found["seen"]["layer"]
    assert found["seen"]["loss"][0] == "torch.bfloat16"


@pytest.mark.parametrize("case", ["float32", "bf16", "evaluation"])
def test_it_is_the_loss_of_the_models_output(found: dict[str, Any], case: str) -> None:
    """With its divisor, report and gradient; also where the forward pass follows the step."""
    compared = found["compared"][case]
    assert compared["found"] == [compared["expected"]] * 2
    assert compared["apart"] == [0.0, 0.0]
    assert ("top1_agreement" in compared["expected"][2]) == (case == "evaluation")


def test_a_model_that_computes_its_loss_itself_is_refused(found: dict[str, Any]) -> None:
    assert "did not call compute_language_model_loss" in found["fused_elsewhere"]
