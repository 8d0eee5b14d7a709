"""Twenty steps on every layout: the losses and the final weights of one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.layouts import PAGE, PROGRAM, RESULT, ROWS, Row, compare, table_of_page
from benchmarks.pages import with_table
from tests.runs import LAYOUT

LOSS_LIMIT = LAYOUT
# AdamW at 0.01 turns the rounding of a gradient that is nearly zero into a step of up to that.
WEIGHT_LIMIT = 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_layout_trains_as_one_process(train: Callable[..., Path], row: Row) -> None:
    found = compare(train, row)
    assert found["learned"] > 1  # nats, in which the differences are too
    assert found["loss"] < LOSS_LIMIT and found["weights"] < WEIGHT_LIMIT


def test_the_page_has_what_was_measured_and_every_layout() -> None:
    result = json.loads(RESULT.read_text())
    assert [row["layout"] for row in result["rows"]] == [row.name for row in ROWS]
    page = PAGE.read_text()
    assert page == with_table(page, PROGRAM, table_of_page(result)), (
        "run python benchmarks/layouts.py"
    )
    for row in result["rows"]:
        assert row["loss"] < LOSS_LIMIT and row["weights"] < WEIGHT_LIMIT
