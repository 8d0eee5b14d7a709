"""What can be tested of `make gpu` and docs/gpu.md without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.predict import PAGE, RESULT, with_tables
from benchmarks.gpu.run import SECONDS, failed, rows_of
from tests.processes import ROOT


def run(*module: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *module],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def tiny(directory: Path, *parts: str) -> dict[str, Any]:
    """Run the parts as `make gpu` does, on the CPU; return {part: its results}."""
    done = run("benchmarks.gpu.run", "tiny", *parts, OUT=str(directory))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((directory / "gpu.json").read_text())
    page = (directory / "gpu.md").read_text()
    assert all(f"## {part}" in page for part in result["parts"])
    parts_: dict[str, Any] = result["parts"]
    return parts_


def not_run(rows: list[dict[str, Any]]) -> set[str]:
    return {row["what"] for row in rows if "not run" in row}


def test_the_page_has_the_predictions() -> None:
    page = PAGE.read_text()
    assert page == with_tables(page, json.loads(RESULT.read_text())), (
        "run python -m benchmarks.gpu.predict"
    )


def test_the_page_lists_every_part_and_its_limit() -> None:
    page = PAGE.read_text()
    rows = [f"| `{name}` | {seconds} s |" for name, (seconds, _) in PARTS.items()]
    assert [row for row in rows if row not in page] == []


def test_without_a_gpu_one_line_says_what_is_needed() -> None:
    done = run("benchmarks.gpu.run", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert done.stderr.startswith("error: make gpu needs ")
    assert done.stdout + done.stderr == done.stderr.splitlines()[0] + "\n"


def test_all_parts_fit_in_ten_minutes() -> None:
    """The last one gets what the others leave; it starts even if they use all of theirs."""
    *others, _ = (seconds for seconds, _ in PARTS.values())
    assert sum(others) < SECONDS < 600


def test_the_checks_pass_on_a_cpu() -> None:
    done = run("benchmarks.gpu.checks", "cpu", "small")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "9 cases agree with the float64 reference\n"


def test_results_are_written_and_what_cannot_run_says_why(tmp_path: Path) -> None:
    found = tiny(tmp_path, "topk", "sanitizer")
    (machine,) = found["machine"]
    assert machine["torch"] == torch.__version__ and machine["GPU"] == "none"
    assert not not_run(found["topk"])
    assert {row["what"] for row in found["topk"]} > {"ours", "torch.topk + logsumexp"}
    reasons = {row["not run"] for row in found["sanitizer"]}
    assert reasons == {"compute-sanitizer is not on PATH"}


def test_a_part_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    (row,) = rows_of("student", 0.2, tmp_path / "log", tiny=True)
    assert row == {"what": "all", "not run": "no time: stopped after 0 s"}


def test_a_part_that_fails_is_a_result(tmp_path: Path) -> None:
    (row,) = rows_of("unknown", 60, tmp_path / "log", tiny=True)
    assert row == {"what": "all", "not run": "KeyError: 'unknown'"}


def test_checks_that_failed_or_did_not_end_fail_the_command() -> None:
    wrong = [{"what": "x", "result": "failed: 1"}, {"what": "y", "result": "done"}]
    assert failed({"tests": wrong}) == ["x"]
    assert failed({"correct": [{"what": "the rest", "not run": "no time"}]}) == ["correct"]
    assert failed({"student": [{"what": "all", "not run": "no megatron"}]}) == []


@pytest.mark.slow
def test_every_part_runs_in_small_on_a_cpu(tmp_path: Path) -> None:
    found = tiny(tmp_path)
    assert list(found) == list(PARTS)
    assert not not_run(found["dump"]) and not not_run(found["nemo"])
    assert not_run(found["student"]) == {"KD + SFT, CUDA graphs of the layers"}
    others = ("Liger", "Megatron")
    for part in ("loss", "head", "topk"):
        assert [name for name in not_run(found[part]) if not name.startswith(others)] == []
    ratios = [row["dump / forward"] for row in found["dump"]]
    assert len(ratios) == 4 and min(ratios) > 0
    (tested,) = found["tests"]
    assert " passed" in tested["result"]
