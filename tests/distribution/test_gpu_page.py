"""The tables of docs/gpu.md are those of benchmarks/results/roofline.json."""

from __future__ import annotations

import json

from benchmarks.gpu.predict import PAGE, RESULT, with_tables


def test_the_page_has_the_predictions() -> None:
    page = PAGE.read_text()
    assert page == with_tables(page, json.loads(RESULT.read_text())), (
        "run python -m benchmarks.gpu.predict"
    )
