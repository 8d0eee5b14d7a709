"""What a dump reads from SFT files of every kind, and its messages about unreadable ones."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.processes import run_program


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """File → [tokens, first answer token, answer tokens, truncated] of each row, or the refusal."""
    result = tmp_path_factory.mktemp("rows") / "read.json"
    run_program("tests/teacher/rows_world.py", result, fork=True)
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def test_prompts_and_answers_beyond_the_limit_are_truncated(read: dict[str, Any]) -> None:
    whole = [18, 9, 9, False]
    assert read["one row"] == [whole]
    # The prompt is cut first; an answer longer than the limit leaves none of it.
    assert read["a long prompt"] == [[40, 31, 9, True], whole]
    assert read["a long answer"] == [[40, 1, 39, True], whole]


def test_conversations_learn_the_assistants_turns_within_the_limit(read: dict[str, Any]) -> None:
    (short, long) = read["conversations"]
    assert short[3] is False and long == [300, short[1], 300 - short[1], True]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("empty", "0.jsonl has no rows: the file is empty"),
        ("not JSON", "2.jsonl, row 1: not JSON (Expecting value"),
        ("a blank line", "row 1: not JSON (a blank line)"),
        ("not UTF-8", "row 1: not UTF-8 (invalid"),
        ("a list", "row 1: a JSON list: expected an object with string fields"),
        ("a number", "row 1: 'output' is 3: expected a string"),
        ("no answer", "row 1: no field 'output'; the row has ['input']"),
        ("an empty answer", "row 1: no answer token: the answer is empty or lies beyond"),
        ("an answer cut away", "row 0: no answer token: the answer is empty or lies beyond"),
        ("a conversation whose answer is beyond the limit", "row 0: no answer token: the answer"),
        ("no conversation", "row 0: no list of turns in `conversations`; the row has ['input', '"),
        ("no turns", "row 1: no list of turns in `conversations`; the row has ['system']"),
        ("by nemo", "row 1: no field 'system'; the row has ['input', 'output']"),
    ],
)
def test_a_file_that_nothing_can_be_learnt_from(
    read: dict[str, Any], file: str, message: str
) -> None:
    assert message in read[file]


def test_rows_that_came_after_nemos_index_are_read_everywhere(read: dict[str, Any]) -> None:
    """Two rows have an index beside them, five are in the file, one in another file."""
    grown = read["grown"]
    assert grown["rows"] == [5, 5] and grown["last rows"] == [True, True]
    assert grown["prompts"] == 5
    assert grown["training"] == [5, 5, 1]
    assert grown["drawn"] == pytest.approx([5 / 11, 5 / 11, 1 / 11], abs=0.01)
    names = ["grown.jsonl", "grown_chat.jsonl"]
    assert grown["files"] == sorted(
        f"{name}{end}" for name in names for end in ("", ".idx.npy", ".idx.info")
    )


def test_a_training_refuses_a_file_of_another_format_at_its_start(read: dict[str, Any]) -> None:
    refusal = read["grown"]["other format"]
    assert "grown.jsonl: 5 of 5 rows that cannot be used:\n  row 0: no list of turns" in refusal
    assert "model.data.train_ds.format sets another format" in refusal


def test_prompts_shortened_for_generation_metrics_are_said(read: dict[str, Any]) -> None:
    assert read["grown"]["no room"] == (
        "grown.jsonl: WARNING: 5 of 5 rows are longer than model.data.validation_ds."
        "max_seq_length=40, with tokens_to_generate=39, and are truncated; 5 of them keep nothing "
        "of their prompt\n"
    )


def test_settings_of_nemos_index_have_no_effect_and_it_is_said(read: dict[str, Any]) -> None:
    assert read["grown"]["said"].splitlines() == [
        f"{where}.memmap_workers=7 has no effect: no index of the rows is kept"
        for where in ("model.data.train_ds",)
    ]
    assert "data.hf_dataset=True reads through a cache" in read["grown"]["refused"]
