"""Prompt templates and tokenizers without NeMo, against NeMo's data set and tokenizers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from nemo_kd.sft import RowError
from nemo_kd.sft.template import PromptTemplate, TemplateError
from tests.conftest import Shared
from tests.processes import run_program

NAMES = ["bytes", "characters", "bare", "sentencepiece"]


@pytest.fixture(scope="module")
def compared(shared: Shared) -> dict[str, Any]:
    """Tokenizer → which attributes are NeMo's, and the number of random rows of each outcome."""
    program = "tests/sft/nemo_tokens.py"
    path = shared("sft", lambda path: run_program(program, path / "found.json", fork=True))
    found: dict[str, Any] = json.loads((path / "found.json").read_text())
    return found


@pytest.mark.parametrize("name", NAMES)
def test_random_rows_have_nemos_tokens(compared: dict[str, Any], name: str) -> None:
    """With awkward spaces, empty and long fields, truncation on either side, added tokens."""
    outcomes = compared[name]["outcomes"]
    assert not [outcome for outcome in outcomes if outcome.startswith("differs")]
    kinds = ("Row", "Row truncated", "NoAnswerError", "NoAnswerError truncated", "refused")
    assert min(outcomes.get(kind, 0) for kind in kinds) > 20


def test_random_rows_cover_both_kinds_of_tokenizers(compared: dict[str, Any]) -> None:
    assert {found["space_sensitive"] for found in compared.values()} == {True, False}


@pytest.mark.parametrize("name", NAMES)
def test_a_tokenizer_is_nemos(compared: dict[str, Any], name: str) -> None:
    assert all(compared[name]["alike"].values()), compared[name]["alike"]


class Characters:
    """A token for each character; no beginning of sequence."""

    vocab_size, bos_id, eos_id, space_sensitive = 256, None, 0, False

    def text_to_ids(self, text: str) -> list[int]:
        return list(text.encode("latin-1"))

    def ids_to_text(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("latin-1")

    def ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [chr(i) for i in ids]


def template(text: str = "{input}{output}", **more: Any) -> PromptTemplate:
    settings = {"label_key": "output", "max_seq_length": 9, **more}
    return PromptTemplate(tokenizer=Characters(), prompt_template=text, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text": "{output} {input}"}, "must end with {output}, the answer's field"),
        ({"text": "\\x{output}", "reader": "nemo"}, "bad escape sequence"),
        ({"truncation_field": "input,context"}, "has no field 'context'"),
        ({"truncation_method": "middle"}, "truncation_method=middle: expected left or right"),
        ({"add_bos": True}, "data.add_bos=true, but the tokenizer has no bos token"),
    ],
)
def test_a_template_of_no_row_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        template(**settings)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "a JSON list: expected an object with string fields"),
        ({"input": "a"}, r"no field 'output'; the row has \['input'\]"),
        ({"input": "a", "output": 3}, "'output' is 3: expected a string"),
        ({"input": "a", "output": "→"}, "its text cannot be tokenized"),
    ],
)
def test_a_row_without_text_is_refused(row: Any, message: str) -> None:
    with pytest.raises(RowError, match=message):
        template()(row)


def test_truncation_fields_share_what_is_too_long() -> None:
    shared = template("{a}|{b}|{output}", truncation_field="a,b", max_seq_length=11)
    made = shared({"a": "12345", "b": "6789", "output": "xyz"})
    assert bytes(made.tokens) == b"123|67|xyz\0" and made.truncated
