"""A dump is the same on every layout, and the teacher's own, dense distribution on one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nemo_kd.store import Store
from tests.layouts.conftest import LAYOUTS, dump_overrides
from tests.layouts.dense import ROWS
from tests.processes import run_program, run_script


def test_every_row_and_answer_token_is_stored(dump: Callable[..., Path], tiny: Path) -> None:
    store = Store(dump())
    rows = (tiny / "train.jsonl").read_text().splitlines()
    assert [sample.row for sample in store] == list(range(len(rows)))
    for sample in store:
        answers = int(sample.loss_mask[1:].sum())
        assert answers > 1
        assert sample.topk.ids.shape == sample.topk.logits.shape == (answers, 20)
        assert sample.topk.logsumexp.shape == (answers, 2)
        assert (np.diff(sample.topk.logits, axis=1) <= 0).all()


def test_store_is_the_top_of_the_teachers_whole_distribution(
    dump: Callable[..., Path], dense: dict[str, NDArray[Any]]
) -> None:
    for row in range(ROWS):
        sample = Store(dump())[row]
        assert np.array_equal(sample.input_ids, dense[f"tokens{row}"])
        targets = sample.answer_positions()
        assert targets[0] == dense[f"answer_start{row}"]
        logits = dense[f"logits{row}"][targets - 1]  # [A, V] float64
        order = np.argsort(-logits, axis=1, kind="stable")[:, :20]
        assert np.array_equal(sample.topk.ids, order)
        top = np.take_along_axis(logits, order, 1)
        assert np.abs(sample.topk.logits - top).max() < 2**-6  # float16, values up to 16
        for place, temperature in enumerate((1.0, 2.0)):
            logsumexp = np.logaddexp.reduce(logits / temperature, axis=1)
            # Values of about 10 in float32: ten units in the last place.
            assert np.abs(sample.topk.logsumexp[:, place] - logsumexp).max() < 1e-5


@pytest.mark.parametrize("layout", ["tp2", "pp2", pytest.param("dp2", marks=pytest.mark.slow)])
def test_layouts_agree(dump: Callable[..., Path], layout: str) -> None:
    assert_same_teacher(dump(), dump(layout))


def assert_same_teacher(a: Path, b: Path) -> None:
    one, other = Store(a), Store(b)
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        assert np.array_equal(mine.input_ids, theirs.input_ids)
        assert np.array_equal(mine.loss_mask, theirs.loss_mask)
        assert np.array_equal(mine.topk.ids, theirs.topk.ids)
        # Relative logits are stored in float16: one unit in the last place of values up to 16.
        assert np.abs(mine.topk.logits - theirs.topk.logits).max() < 2**-6
        assert np.abs(mine.topk.logsumexp - theirs.topk.logsumexp).max() < 1e-5  # as above, float32


def test_a_finished_dump_is_not_repeated_and_writes_jsonl(
    dump: Callable[..., Path], tiny: Path
) -> None:
    """The same command once more: every shard is whole, only the exchange file is new."""
    store, overrides = dump("tp2"), LAYOUTS["tp2"]
    before = {path: path.stat().st_mtime_ns for path in store.rglob("segment-*/*")}
    done = run_script(
        "dump_teacher_topk.py",
        *dump_overrides(tiny, "train", store),
        "jsonl=true",
        *overrides[1],
        processes=2,
    )
    assert "the store is complete; nothing is dumped" in done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in store.rglob("segment-*/*")}
    lines = (store / "topk.jsonl").read_text().splitlines()
    for sample, line in zip(Store(store), lines, strict=True):
        record = json.loads(line)
        answers = sample.answer_positions() - 1
        assert record["tokens"] == sample.input_ids[:-1].tolist()
        assert np.array_equal(np.array(record["topk_token_ids"])[answers], sample.topk.ids)
        assert np.allclose(np.array(record["topk_logits"])[answers], sample.topk.logits, atol=2**-6)


@pytest.mark.slow
def test_no_collective_is_as_wide_as_the_vocabulary(
    dump: Callable[..., Path], tiny: Path, tmp_path: Path
) -> None:
    """Of the logits, K keys of two words go to each of the TP ranks, and the log-sum-exps."""
    processes, overrides = LAYOUTS["tp2"]
    base = dump_overrides(tiny, "train", tmp_path / "store")
    arguments = [str(tmp_path / "moved"), *base, *overrides]
    run_program("tests/layouts/moved.py", *arguments, processes=processes, fork=True)
    answers = sum(len(sample.topk.ids) for sample in Store(dump()))
    for rank in range(processes):
        moved = json.loads((tmp_path / f"moved.{rank}").read_text())
        shapes = [(one["name"], shape) for one in moved for shape in one["shapes"] if shape]
        assert max(shape[-1] for _, shape in shapes) < 500 // processes
        keys = [shape for name, shape in shapes if name == "gloo:all_gather" and shape[-1] == 20]
        assert sum(shape[0] for shape in keys) == answers
        sums = [s for name, s in shapes if name == "gloo:all_reduce" and len(s) == 2 and s[1] == 2]
        assert sum(shape[0] for shape in sums) == answers


def test_a_teacher_that_never_agrees_with_the_labels_is_warned_of(
    tiny: Path, tmp_path: Path
) -> None:
    overrides = dump_overrides(tiny, "heldout", tmp_path / "store")[1:]
    untrained = f"model.restore_from_path={tiny}/student.nemo"
    done = run_script("dump_teacher_topk.py", untrained, *overrides)
    assert "this run: 10 rows" in done.stdout
    assert "WARNING: agreement is below 10%: check that data.prompt_template" in done.stdout


def test_ranks_show_one_job(dump: Callable[..., Path]) -> None:
    """Two replicas, 20 rows and 17: one count of rows, and a summary that is one process's."""
    printed = {}
    for layout in ("one", "dp2", "tp2"):
        printed[layout] = (dump(layout).parent / "stdout.txt").read_text()
        assert "dump: 37/37 rows" in (dump(layout).parent / "stderr.txt").read_text()
    summary, store = printed["one"].split(str(dump()))
    assert printed["dp2"].split(str(dump("dp2"))) == [summary, store]
    assert (
        "this run: 37 rows" in summary
        and "at T = 2" in summary
        and "highest teacher loss" in summary
    )
    assert "bytes per token" in store
    worst = summary.split("(nats per token): ")[1].split(" (")[0]
    assert worst == printed["tp2"].split("(nats per token): ")[1].split(" (")[0]


def test_data_parallel_dump_has_the_same_bytes(dump: Callable[..., Path]) -> None:
    files = sorted(path.relative_to(dump()) for path in dump().rglob("*") if path.is_file())
    assert len(files) > 5
    for file in files:
        assert (dump() / file).read_bytes() == (dump("dp2") / file).read_bytes(), file
