"""What a dump reads of SFT files of every kind, and what it says of those it cannot read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.conftest import program


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """File → [tokens, first answer token, answer tokens, cut] of each row, or the refusal."""
    result = tmp_path_factory.mktemp("rows") / "read.json"
    program("tests/teacher/rows_world.py", result)
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def test_prompts_and_answers_beyond_the_limit_are_cut_and_known_to_be(read: dict[str, Any]) -> None:
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
        ("a blank line", "row 1: not JSON"),
        ("a list", "row 1: not what NeMo's SFT takes (list indices must be integers"),
        ("a number", "row 1: not what NeMo's SFT takes ('int' object has no attribute 'strip')"),
        ("no answer", "row 1: no field 'output'; the row has ['input']"),
        ("an empty answer", "row 1: no answer token ('output' is empty or was cut away"),
        ("an answer cut away", "row 0: no answer token ('output' is empty or was cut away"),
        ("a conversation whose answer is beyond the limit", "row 0: no answer token to learn from"),
        ("no conversation", "row 0: no field 'system'; the row has ['input', 'output']"),
    ],
)
def test_a_file_that_nothing_can_be_learnt_from(
    read: dict[str, Any], file: str, message: str
) -> None:
    assert message in read[file]
