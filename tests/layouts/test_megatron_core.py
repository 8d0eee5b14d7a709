"""The example without NeMo: Megatron-core's own loop on a store."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.environments import Environment, MissingPython, make
from benchmarks.layouts import PAGE
from benchmarks.matrix import (
    COLUMNS,
    ENVIRONMENTS,
    ONE,
    PROGRAM,
    RESULT,
    compared,
    faults,
    table_of_page,
)
from benchmarks.pages import with_table
from nemo_kd.loss import KDConfig
from tests.processes import run_program
from tests.runs import LAYOUT

EXAMPLE = "examples/megatron_core/train.py"
SAME_WEIGHTS = "tests/layouts/same_weights.py"
SAME = ["--micro-batch-size=1", "--global-batch-size=8"]
# The example prints five decimals; and see `LAYOUT`.
PRINTED = LAYOUT


def losses(
    store: Path,
    *options: str,
    processes: int = 1,
    steps: int = 6,
    program: str = EXAMPLE,
    fork: bool = False,
) -> list[dict[str, float]]:
    done = run_program(
        program,
        f"--store={store}",
        f"--steps={steps}",
        "--lr=0.01",
        *options,
        processes=processes,
        fork=fork,
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


@pytest.fixture(scope="module")
def one(dump: Callable[..., Path]) -> list[dict[str, float]]:
    return losses(dump(), *SAME, program=SAME_WEIGHTS, fork=True)


@pytest.mark.parametrize(
    ("processes", "options"),
    [
        *(pytest.param(n, options, id=name) for name, (n, options, _) in COLUMNS.items() if n > 1),
        pytest.param(
            *(4, ["--tensor-parallel=2", "--pipeline-parallel=2"]),
            id="TP 2 × PP 2",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_layout_trains_as_one_process(
    dump: Callable[..., Path], one: list[dict[str, float]], processes: int, options: list[str]
) -> None:
    """From the same weights; interleaved, each loss must meet its own micro-batch's teacher."""
    given = [*SAME, *options]
    other = losses(dump(), *given, processes=processes, program=SAME_WEIGHTS, fork=True)
    for a, b in zip(one, other, strict=True):
        assert a == pytest.approx(b, abs=PRINTED)
    assert one[-1]["kd_loss"] < one[0]["kd_loss"] - 0.3


def test_the_page_has_the_matrix_of_every_version() -> None:
    result = json.loads(RESULT.read_text())
    rows = result["rows"]
    assert [row["environment"] for row in rows] == [made.name for made in ENVIRONMENTS]
    assert faults(rows) == []
    page = PAGE.read_text()
    assert page == with_table(page, PROGRAM, table_of_page(result)), "run make matrix"


def test_the_matrix_says_what_is_missing_or_differs() -> None:
    first: dict[str, Any] = {ONE: [[2.0, 1.0]], "dump": "00", "dump, PP 2": "02"}
    found = {ONE: [[2.0, 1.00002]], "PP 2": {"error": "died"}, "dump": "01", "dump, PP 2": "02"}
    rows: list[dict[str, Any]] = [
        {"environment": "A", "missing": "A needs Python 3.12"},
        {"environment": "B", "cells": compared(found, first, first)},
    ]
    assert faults(rows) == [
        "A needs Python 3.12",
        "B, 1 process: a loss differs by 2.0e-05",
        "B, PP 2: died",
        "B, dump: the store has other bytes than the first version's",
    ]
    assert faults([{"environment": "C", "cells": compared(first, first, first)}]) == []


def test_an_environment_without_its_python_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        MissingPython, match=r"0\.19\.2 needs Python 3\.99, and there is no python3\.99 on PATH"
    ):
        make(Environment(("megatron-core==0.19.2",), python=(3, 99)), tmp_path)


def test_the_running_environment_is_used_where_it_has_the_versions(tmp_path: Path) -> None:
    installed = importlib.metadata.version("megatron-core")
    made = make(Environment((f"megatron-core=={installed}",)), tmp_path)
    assert made.python == sys.executable and made.versions["megatron-core"] == installed
    assert not list(tmp_path.iterdir())
