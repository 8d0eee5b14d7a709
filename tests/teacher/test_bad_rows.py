"""Rows that cannot be used, files that change, and teachers with NaN and -inf."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nemo_kd.store import Store, verify
from tests.conftest import Shared
from tests.processes import run_program
from tests.teacher.test_hf import same_files

PRESENT = (1, 40, 41, 47, 100, 298)
"""The ids for which the teacher has a logit above -inf."""


@pytest.fixture(scope="module")
def world(shared: Shared) -> Path:
    program = "tests/teacher/bad_rows_world.py"
    return shared("bad rows", lambda path: run_program(program, path, fork=True))


@pytest.fixture(scope="module")
def said(world: Path) -> dict[str, list[str]]:
    """Run → its refusal, standard output and standard error."""
    found: dict[str, list[str]] = json.loads((world / "said.json").read_text())
    return found


@pytest.mark.parametrize("profile", ["plain", "all", "compact", "top_p", "sampled"])
def test_a_logit_of_minus_infinity_is_an_absent_id(world: Path, profile: str) -> None:
    """The teacher has six ids, the store asks for 20, or for all 299."""
    store = Store(world / f"store-{profile}")
    assert len(store) == 9 and not list(verify(store))
    for sample in store:
        present = sample.topk.ids >= 0
        assert np.array_equal(present, np.isfinite(sample.topk.logits))
        if profile != "sampled":
            assert (present.sum(1) == len(PRESENT)).all()
            mass = np.exp(sample.topk.logits - sample.topk.logsumexp[:, :1]).sum(1)
            assert np.abs(mass - 1).max() < 2e-3  # float16's
        assert set(sample.topk.ids[present]) <= set(PRESENT)


def test_all_bad_rows_are_named_before_the_first_pass(
    world: Path, said: dict[str, list[str]]
) -> None:
    refusal, output, errors = said["refused"]
    assert refusal.startswith(f"RowError: {world}/bad: 4 of 9 rows that cannot be used:\n")
    assert "\n  row 2: not JSON (Expecting value" in refusal
    assert "\n  row 5: 'input' is 3: expected a string" in refusal
    assert "\n  row 6: no field 'output'; the row has ['input']" in refusal
    assert "\n  row 7: not JSON (a blank line)" in refusal
    assert "on_bad_row=drop for those that cannot be read, data.no_answer=drop" in refusal
    assert not output and not errors
    assert [path.name for path in (world / "refused").iterdir()] == ["spec.json"]


def test_dropped_rows_are_counted_and_named(world: Path, said: dict[str, list[str]]) -> None:
    refusal, output, errors = said["dropped"]
    assert not refusal
    assert [sample.row for sample in Store(world / "dropped")] == [0, 1, 3, 4]
    assert "bad: left out 4 of 9 rows that cannot be used:\n  row 2: not JSON" in errors
    assert "dump: 9/9 rows" in errors
    for text in (output, errors):
        assert "left out: 4 rows that cannot be read" in text
        assert "left out: 1 rows without a finite logit of the teacher" in text
    assert "no row is left to dump: 2 of 2 rows" in said["nothing"][0]


def test_rows_that_an_earlier_run_left_out_are_not_passed_over(
    world: Path, said: dict[str, list[str]]
) -> None:
    """Neither in a complete store nor in one that is resumed."""
    assert "has left out 5 rows of the complete shards" in said["dropped, complete"][0]
    assert "set the same again to keep these shards, or overwrite=true" in said["half, all"][0]
    assert "has left out 1 rows" in said["half, all"][0]
    assert not said["dropped, again"][0] and not said["half, the same"][0]
    # The one setting does not stand for the other.
    assert "has left out 5 rows" in said["dropped, otherwise"][0]
    assert "has left out 1 rows" in said["empty, otherwise"][0]
    assert not said["empty"][0] and not said["empty, all drop"][0]
    assert "1 of 2 shards are complete" in said["half"][1]
    assert [sample.row for sample in Store(world / "half-store")] == [0, 1, 3]


def test_a_row_with_nan_is_refused_by_number_and_complete_shards_are_kept(
    said: dict[str, list[str]],
) -> None:
    refusal, _, _ = said["NaN"]
    assert "data, row 7: the teacher's logits at answer token 0 are not a distribution" in refusal
    assert "on_bad_row=drop" in refusal
    assert "2 of 2 complete shards have unchanged rows and are kept" in said["mended"][2]


@pytest.mark.parametrize("name", ["mended", "longer", "shorter", "changed"])
def test_a_corrected_file_resumes_to_the_store_of_a_new_dump(
    world: Path, said: dict[str, list[str]], name: str
) -> None:
    same_files(world / name, world / f"{name}-fresh")
    assert not list(verify(Store(world / name)))
    counts = {
        "mended": (2, 2, 3),
        "longer": (2, 3, 5),
        "shorter": (0, 4, 4),
    }
    if name in counts:
        kept, shards, rows = counts[name]
        _, output, errors = said[name]
        assert f"{kept} of {shards} complete shards have unchanged rows" in errors
        assert f"{shards - kept} are dumped again or removed" in errors
        assert f"this run: {rows} rows" in output


def test_a_difference_other_than_the_files_bytes_is_refused(said: dict[str, list[str]]) -> None:
    assert "top_k: 20 in the store, 19 now" in said["other K"][0]


def test_a_file_that_changes_during_the_dump_is_noticed(said: dict[str, list[str]]) -> None:
    assert "data has changed since this run began to read it" in said["changed"][0]
    assert "this run: 10 rows" in said["changed, again"][1]


def test_a_directory_that_is_being_written_is_refused(said: dict[str, list[str]]) -> None:
    assert "locked is being written by another job: host " in said["locked"][0]


def test_no_lock_is_left(world: Path) -> None:
    assert not list(world.rglob(".lock*"))


def test_generation_does_the_same_with_its_prompts(world: Path, said: dict[str, list[str]]) -> None:
    assert (
        "prompts: 1 of 4 rows that cannot be used:\n  row 2: not JSON" in said["prompts refused"][0]
    )
    assert "prompts, row 1: the teacher's logits at answer token 0" in said["answers refused"][0]
    assert "truncated" not in "".join(said["answers dropped"])
    refusal, output, errors = said["answers dropped"]
    assert not refusal and "this run: 4 answers" in output
    assert "left out: 2 rows without a finite logit of the teacher" in output
    assert "left out 1 of 4 rows that cannot be used:\n  row 2" in errors
    assert [sample.row for sample in Store(world / "generated-dropped")] == [0, 1, 6, 7]


def test_prompts_that_leave_no_room_for_an_answer_are_truncated_and_named(
    world: Path, said: dict[str, list[str]]
) -> None:
    refusal, output, errors = said["prompts truncated"]
    assert not refusal
    assert (
        "WARNING: 1 of 2 rows are longer than data.max_seq_length=20 less "
        "generation.max_new_tokens=9 and are truncated"
    ) in errors
    assert errors.count("WARNING") == 1
    assert "WARNING: 2 answers are to truncated prompts: data.max_seq_length" in output
    lengths = [int(sample.answer_positions()[0]) for sample in Store(world / "generated-short")]
    assert lengths == [3, 3, 10, 10]
