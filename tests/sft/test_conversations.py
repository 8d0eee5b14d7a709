"""NeMo's layout of conversations: exactly the speakers' words and their ends are learned."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nemo_kd.sft import RowError
from nemo_kd.sft.config import TURN_TOKENS
from nemo_kd.sft.conversations import NemoTurns, as_conversation
from nemo_kd.sft.rows import NoAnswerError
from nemo_kd.sft.tokenizer import decoded
from tests.conftest import Shared
from tests.processes import run_program
from tests.sft.vocabularies import gpt2_like

TURN = "<extra_id_1>"


def row(*turns: str | tuple[str, Any], **more: Any) -> dict[str, Any]:
    """A conversation that users begin; a turn is its text, or text and label."""
    values = []
    for i, turn in enumerate(turns):
        value, label = (turn, None) if isinstance(turn, str) else turn
        values.append({"from": ("User", "Assistant")[i % 2], "value": value, "label": label})
    return {"system": "s", "mask": "User", "conversations": values, **more}


def encoder(**texts: str) -> NemoTurns:
    return NemoTurns(gpt2_like(), {**TURN_TOKENS, **texts})


def pieces(conversation: dict[str, Any], encode: NemoTurns | None = None) -> tuple[str, list[str]]:
    """The whole text of the tokens, and the text of each learned stretch."""
    encode = encode or encoder()
    ids, mask = encode(conversation)[:2]
    found: list[list[int]] = []
    for i, (token, learned) in enumerate(zip(ids, mask, strict=True)):
        if learned and not (i and mask[i - 1]):
            found.append([])
        if learned:
            found[-1].append(token)
    return decoded(encode.tokenizer, ids), [decoded(encode.tokenizer, one) for one in found]


def test_the_text_is_nemos_and_the_assistants_words_and_ends_are_learned() -> None:
    text, learned = pieces(row("hi", "hello", "and?", "bye"))
    assert text == (
        "<extra_id_0>System\ns\n<extra_id_1>User\nhi\n<extra_id_1>Assistant\nhello\n"
        "<extra_id_1>User\nand?\n<extra_id_1>Assistant\nbye\n<extra_id_1>"
    )
    assert learned == [f"hello\n{TURN}", f"bye\n{TURN}"]


@pytest.mark.parametrize("end", ["", "\n", "\n\n", " ", "\t\n "])
@pytest.mark.parametrize("answer", ["use y", "use y\n", "\n\nuse y", "", " ", "答え 🙂\n"])
def test_awkward_ends_of_turns_shift_nothing(end: str, answer: str) -> None:
    _, learned = pieces(row("fix this" + end, answer, "and this" + end, "use z" + end, "thanks"))
    assert learned == [f"{answer}\n{TURN}", f"use z{end}\n{TURN}"]


def test_a_conversation_may_end_with_a_user_and_have_no_system_prompt() -> None:
    text, learned = pieces(row("a", "first answer", "thanks", system=""))
    assert text.startswith(f"<extra_id_0>System\n\n{TURN}User\na\n")
    assert learned == [f"first answer\n{TURN}"]
    assert pieces(row("a", "b", system=None))[1] == [f"b\n{TURN}"]


def test_the_texts_around_turns_can_be_chosen() -> None:
    names = {
        "system_turn_start": "AA",
        "turn_start": "BB",
        "end_of_turn": "DD",
        "end_of_name": "EE",
    }
    text, learned = pieces(row("hi", "hello"), encoder(**names))
    assert text == "AASystemEEsDDBBUserEEhiDDBBAssistantEEhelloDDBB" and learned == ["helloDDBB"]


def test_labels_before_a_text_are_context_and_labels_after_it_are_learned() -> None:
    labelled = ("hi", ("hello", "toxicity:0"))
    text, learned = pieces(row(*labelled, type="VALUE_TO_TEXT"))
    assert "Assistant\n<extra_id_2>toxicity:0\nhello\n" in text and learned == [f"hello\n{TURN}"]
    text, learned = pieces(row(*labelled, type="TEXT_TO_VALUE"))
    assert "Assistant\nhello\n<extra_id_2>toxicity:0\n" in text
    assert learned == [f"toxicity:0\n{TURN}"]


def test_every_token_can_be_learned() -> None:
    encode = NemoTurns(gpt2_like(), TURN_TOKENS, learn_all=True)
    assert encode(row("hi", "hello")).loss_mask.all()


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([1], "a JSON list: expected an object with `conversations`"),
        ({"messages": []}, r"no list of turns in `conversations`; the row has \['messages'\]"),
        (row(), "no list of turns"),
        ({"conversations": [{"from": "User"}]}, "turn 0 has no texts `from` and `value`"),
        (row("a", "b", type="OTHER"), "`type` is 'OTHER': expected null, TEXT_TO_VALUE or"),
        (row("a", "b", mask="human"), "`mask` is 'human', but the speakers are Assistant, User"),
        (row("a", "b", mask=None), "`mask` is None, but the speakers"),
        (row("a", ("b", 3), type="VALUE_TO_TEXT"), "the `label` of a turn is 3"),
        (row("a", "b", system=3), "`system` is 3: expected a text"),
        (row("a\ud800", "b"), "lone surrogate"),
    ],
)
def test_a_row_of_another_shape_is_refused(conversation: Any, message: str) -> None:
    with pytest.raises(RowError, match=message):
        encoder()(conversation)


def test_a_conversation_without_an_answer_has_nothing_to_learn() -> None:
    for turns in (["a"], ["a", ""], ["a", " \n", "b", ""]):
        with pytest.raises(NoAnswerError):
            encoder()(row(*turns))
    assert NemoTurns(gpt2_like(), TURN_TOKENS, learn_all=True)(row("a", "")).loss_mask.all()
    assert pieces(row("a", ("", "good"), type="TEXT_TO_VALUE"))[1] == [f"good\n{TURN}"]


def test_messages_become_nemos_turns() -> None:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
    ]
    assert pieces(as_conversation(messages)) == pieces(row("hi", "hello"))
    with pytest.raises(RowError, match=r"message 3 \(tool\) does not fit into NeMo's turns"):
        as_conversation([*messages, {"role": "tool", "content": "x"}])
    with pytest.raises(RowError, match=r"message 0 \(assistant\): thinking: NeMo's turns have no"):
        as_conversation([{"role": "assistant", "content": "x", "thinking": "y"}])


@pytest.fixture(scope="module")
def compared(shared: Shared) -> dict[str, Any]:
    program = "tests/sft/nemo_talk.py"
    path = shared("talk", lambda path: run_program(program, path / "found.json", fork=True))
    found: dict[str, Any] = json.loads((path / "found.json").read_text())
    return found


@pytest.mark.parametrize("name", ["bytes", "sentencepiece"])
def test_random_conversations_have_nemos_tokens_and_mask(
    compared: dict[str, Any], name: str
) -> None:
    """Wherever NeMo reads them without a mismatch of its own."""
    outcomes = compared[name]
    assert not [one for one in outcomes if one.startswith("differs")]
    assert outcomes["same"] > 150


def test_nemos_reader_counts_the_rows_that_it_changes(compared: dict[str, Any]) -> None:
    assert compared["altered"] == [False, True, False, False, True]
