"""Samples of a store keep to the positions that a model learned, in packs too: `positions.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Shared
from tests.layouts.positions import POSITIONS
from tests.processes import run_program


@pytest.fixture(scope="module")
def found(shared: Shared) -> dict[str, Any]:
    def make(directory: Path) -> None:
        run_program("tests/layouts/positions.py", directory, fork=True)

    return dict(json.loads((shared("positions", make) / "found.json").read_text()))


def test_samples_of_packs_are_truncated_to_the_learned_positions(found: dict[str, Any]) -> None:
    single, packed = found["False"], found["True"]
    assert single["tokens"] == packed["tokens"] == POSITIONS
    assert packed["position"] == POSITIONS - 2  # the last token is a label only
    assert packed["samples"] == single["samples"] == 6


def test_packs_are_filled_by_the_truncated_lengths(found: dict[str, Any]) -> None:
    # 8, 11, 14 and three times 15 inputs in packs of 64; untruncated: 8, 11, 14, 17, 20, 23.
    assert found["True"]["inputs"] == found["False"]["inputs"] == 8 + 11 + 14 + 3 * 15
    assert found["True"]["packs"] == 2


def test_stores_need_padding_for_expert_parallelism_too(found: dict[str, Any]) -> None:
    message = "model.data.train_ds.pad_to_max_length must be true with model.expert_model_parallel"
    assert found["refused"].startswith(message)
