"""Rows of every format: which one a file has, what is learned, what is recorded and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nemo_kd.errors import NemoKDError
from nemo_kd.sft import JsonlFile, RowError
from nemo_kd.sft.checks import Seen
from nemo_kd.sft.config import RowConfig, template_hash
from nemo_kd.sft.reader import Model, open_rows
from nemo_kd.sft.rows import NoAnswerError, SFTRows
from nemo_kd.sft.tokenizer import HFTokenizer, decoded
from tests.sft.test_spans import sentence_piece
from tests.sft.vocabularies import gpt2_like, saved, with_bos

PROMPT = {"input": "größe?", "output": "  two\n"}
MESSAGES = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
TURNS = [{"from": "User", "value": "q"}, {"from": "Assistant", "value": "a"}]
TALK = {"system": "s", "mask": "User", "conversations": TURNS}


def turns_with(number: int, **more: Any) -> dict[str, Any]:
    """A conversation of which one turn has more keys."""
    turns = [{**turn, **(more if i == number else {})} for i, turn in enumerate(TURNS)]
    return {**TALK, "conversations": turns}


CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>{% endfor %}"


def spaced() -> HFTokenizer:
    """As Llama 2's, which puts a space before every text."""
    tokenizer = sentence_piece()
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    return saved(tokenizer)


def read(
    path: Path, *values: Any, tokenizer: Any = None, length: int = 100, **settings: Any
) -> tuple[SFTRows, list[str]]:
    file, said = path / "rows.jsonl", list[str]()
    file.write_text("".join(json.dumps(value) + "\n" for value in values))
    model = Model(tokenizer=tokenizer or gpt2_like(), max_seq_length=length)
    return open_rows(RowConfig(**settings), JsonlFile(file), model, said.append), said


def texts(rows: SFTRows, row: int = 0, tokenizer: Any = None) -> tuple[str, str]:
    """All text of a row, and what is learned."""
    found, tokenizer = rows[row], tokenizer or gpt2_like()
    learned = decoded(tokenizer, found.input_ids[found.loss_mask == 1])
    return decoded(tokenizer, found.input_ids), learned


@pytest.mark.parametrize(
    ("value", "settings", "found", "whole", "learned"),
    [
        (PROMPT, {}, "prompt", "größe?   two\n<eos>", "   two\n<eos>"),
        (MESSAGES, {"chat_template": CHAT}, "messages", "[user]q<eos>[assistant]a<eos>", "a<eos>"),
        (TALK, {}, "conversations", None, "a\n<extra_id_1>"),
        ({"text": " all"}, {}, "text", " all<eos>", "all<eos>"),
        ({**PROMPT, "text": "x"}, {}, "prompt", "größe?   two\n<eos>", "   two\n<eos>"),
        ({**PROMPT, "text": "x"}, {"format": "text"}, "text", "x<eos>", "<eos>"),
        (MESSAGES, {"chat_template": "nemo"}, "messages", None, "a\n<extra_id_1>"),
        (TALK, {"chat_template": CHAT}, "conversations", None, "a<eos>"),
    ],
)
def test_the_first_row_decides_unless_the_format_is_set(
    tmp_path: Path, value: Any, settings: Any, found: str, whole: str | None, learned: str
) -> None:
    rows, said = read(tmp_path, [1], value, **settings)
    assert rows.template["format"] == found
    assert rows.template["chat"] == (found in ("messages", "conversations"))
    text, own = texts(rows, 1)
    assert whole in (None, text) and own == learned
    assert len(said) == (found != "prompt" and "format" not in settings)
    assert not rows.check(1).altered


def test_rows_with_two_formats_are_said_to_have_one(tmp_path: Path) -> None:
    rows, said = read(tmp_path, {**PROMPT, **MESSAGES})
    assert rows.template["format"] == "prompt" and "are read as prompt; data.format" in said[0]


@pytest.mark.parametrize("template", [CHAT, "nemo"])
def test_the_format_names_the_key_of_a_row_that_has_both(tmp_path: Path, template: str) -> None:
    both = {**TALK, "messages": [{"role": "assistant", "content": "other"}]}
    both["messages"] = [{"role": "user", "content": "x"}, *both["messages"]]
    for name, answer in (("conversations", "a"), ("messages", "other"), ("auto", "other")):
        rows, _ = read(tmp_path, both, chat_template=template, format=name)
        assert texts(rows)[1].startswith(answer)


@pytest.mark.parametrize("template", [CHAT, "nemo"])
def test_a_system_text_beside_messages_is_read(tmp_path: Path, template: str) -> None:
    rows, _ = read(tmp_path, {"system": "Brief!", **MESSAGES}, chat_template=template)
    assert "Brief!" in texts(rows)[0] and texts(rows)[1].startswith("a")


def test_the_chat_template_is_recorded_with_its_hash(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(CHAT)
    rows, _ = read(tmp_path, MESSAGES, chat_template=str(tmp_path / "own.jinja"))
    assert rows.template["chat_template"] == CHAT
    assert rows.template["chat_template_sha256"] == template_hash(CHAT)
    assert "chat_template_sha256" not in read(tmp_path, PROMPT)[0].template


@pytest.mark.parametrize(
    ("template", "whole"),
    [
        ("Größe: {input}\\n答:{output}", "Größe: größe?\n答:  two\n"),
        ("\\\\nabla \\alpha {input}\\t{output}", "\\nabla \\alpha größe?\t  two\n"),
        ("\\u00e9 {input} {output}", "é größe?   two\n"),
        ("{input}{output}", "größe?  two\n"),
    ],
)
@pytest.mark.parametrize("kind", ["bytes", "sentence pieces"])
def test_templates_and_fields_are_taken_as_they_are(
    tmp_path: Path, template: str, whole: str, kind: str
) -> None:
    tokenizer = gpt2_like() if kind == "bytes" else spaced()
    rows, _ = read(tmp_path, PROMPT, tokenizer=tokenizer, prompt_template=template, add_eos=False)
    text, learned = texts(rows, 0, tokenizer)
    assert text == whole and whole.endswith(learned) and learned.endswith(" two\n")
    assert not rows.check(0).altered


def test_the_marks_of_turns_may_have_escape_sequences(tmp_path: Path) -> None:
    rows, _ = read(tmp_path, TALK, chat_prompt_tokens={"end_of_turn": "<end>\\n"})
    assert texts(rows)[1] == "a<end>\n<extra_id_1>"


def test_a_text_is_cut_on_either_side(tmp_path: Path) -> None:
    right, _ = read(tmp_path, {"text": "abcdef"}, length=4)
    left, _ = read(tmp_path, {"text": "abcdef"}, length=4, truncation_method="left")
    assert (texts(right)[0], texts(left)[0]) == ("abcd", "def<eos>")
    assert right[0].truncated and left[0].truncated


LONG = {
    "system": "S",
    "mask": "User",
    "conversations": [
        {"from": "User", "value": "q1"},
        {"from": "Assistant", "value": "first answer"},
        {"from": "User", "value": "q2"},
        {"from": "Assistant", "value": "last answer"},
    ],
}
SYSTEM, Q1, Q2 = "<extra_id_0>System\nS\n", "<extra_id_1>User\nq1\n", "<extra_id_1>User\nq2\n"
FIRST = "<extra_id_1>Assistant\nfirst answer\n"
LAST = "<extra_id_1>Assistant\nlast answer\n<extra_id_1>"


@pytest.mark.parametrize(
    ("side", "unit", "whole", "learned"),
    [
        ("left", "turn", SYSTEM + Q2 + LAST, "last answer\n<extra_id_1>"),
        ("right", "turn", SYSTEM + Q1 + FIRST + Q2, "first answer\n<extra_id_1>"),
        ("left", "token", None, "first answer\n<extra_id_1>last answer\n<extra_id_1>"),
        ("right", "token", None, "first answer\n<extra_id_1>"),
    ],
)
@pytest.mark.parametrize("answer_only", [True, False])
def test_nemos_turns_are_cut_on_either_side(
    tmp_path: Path, side: str, unit: str, whole: str | None, learned: str, answer_only: bool
) -> None:
    text, tokenizer = SYSTEM + Q1 + FIRST + Q2 + LAST, gpt2_like()
    full = read(tmp_path, LONG, length=1000)[0][0].input_ids
    assert decoded(tokenizer, full) == text
    limit = len(full) - len(tokenizer.text_to_ids("last answer\n<extra_id_1>")) - 1
    if (side, unit) == ("left", "token"):
        limit = len(full) - 3
    rows, _ = read(
        tmp_path, LONG, length=limit, truncation_method=side, truncate_at=unit,
        train_on="all_assistant" if answer_only else "all",
    )  # fmt: skip
    cut = full[-limit:] if side == "left" else full[:limit]
    expected = decoded(tokenizer, cut) if whole is None else whole
    assert rows[0].truncated and len(rows[0]) <= limit
    assert texts(rows)[0] == expected
    assert texts(rows)[1] == learned if answer_only else rows[0].loss_mask[1:].all()


def test_a_conversation_of_which_no_turn_fits_is_refused(tmp_path: Path) -> None:
    for side in ("left", "right"):
        rows, _ = read(tmp_path, LONG, length=9, truncation_method=side, truncate_at="turn")
        with pytest.raises(RowError, match=r"row 0: .*(no learned turn fits|no answer token)"):
            rows[0]


@pytest.mark.parametrize(
    ("value", "settings", "unread"),
    [
        (PROMPT, {"train_on": "all", "truncate_at": "turn"}, ["train_on=all", "truncate_at=turn"]),
        (PROMPT, {"chat_template": CHAT}, ["chat_template={% for m in messages %}"]),
        (PROMPT, {"add_eos": False, "prompt_template": "{input}{output}"}, []),
        (TALK, {"chat_template_kwargs": {"x": 1}}, ["chat_template_kwargs={'x': 1}"]),
        (TALK, {"train_on": "all", "truncate_at": "turn", "truncation_method": "left"}, []),
        (MESSAGES, {"chat_template": CHAT, "add_sep": True}, ["add_sep=true"]),
        (
            MESSAGES,
            {"chat_template": CHAT, "add_bos": True, "chat_prompt_tokens": {"turn_start": "@"}},
            ["add_bos=true", "chat_prompt_tokens={'turn_start': '@'}"],
        ),
        (MESSAGES, {"chat_template": CHAT, "prompt_template": None, "train_on": "all"}, []),
        ({"text": "x"}, {"truncate_at": "turn"}, ["truncate_at=turn"]),
    ],
)
def test_settings_that_the_format_does_not_read_are_said(
    tmp_path: Path, value: Any, settings: Any, unread: list[str]
) -> None:
    _, said = read(tmp_path, value, **settings)
    lines = [line for line in said if "has no effect" in line]
    assert len(lines) == len(unread)
    for line, setting in zip(lines, unread, strict=True):
        assert line.startswith(f"data.{setting}") and " has no effect on rows read as " in line


def test_what_a_template_takes_off_an_answer_is_counted(tmp_path: Path) -> None:
    trimming = CHAT.replace("m.content", "m.content | trim")
    indented = {"messages": [MESSAGES["messages"][0], {"role": "assistant", "content": "    x"}]}
    rows, _ = read(tmp_path, MESSAGES, indented, chat_template=trimming)
    assert [rows.check(i).altered for i in range(2)] == [False, True]
    assert "the chat template takes something off" in " ".join(rows.altered_by.split())


@pytest.mark.parametrize(
    ("value", "settings", "message"),
    [
        (PROMPT, {"chat": True}, "row 0: no list of turns in `conversations`; the row has"),
        (PROMPT, {"chat": True, "format": "prompt"}, "data.chat=true is for conversations"),
        (PROMPT, {"prompt_template": None}, "data.prompt_template is null, but the rows"),
        (MESSAGES, {"reader": "nemo"}, "data.reader=nemo, but the rows of .* are messages"),
        (TALK, {"reader": "nemo"}, "conversations are read by NeMo itself, which is not installed"),
        (MESSAGES, {}, "has no chat template; name a Jinja file with data.chat_template=FILE"),
        (MESSAGES, {"chat_template": "{% if %}"}, "the chat template cannot be compiled"),
        (MESSAGES, {"chat_template": "no.jinja"}, "no.jinja is no chat template"),
        (TALK, {"train_on": "last_assistant"}, "does not work with NeMo's turns"),
        (turns_with(1, weight=0), {}, "row 0: turn 1: weight 0: NeMo's turns have no place"),
        (turns_with(1, reasoning_content="r"), {}, "turn 1: reasoning_content: NeMo's turns have"),
        (turns_with(1, tool_calls=[{"name": "f"}]), {}, "turn 1: tool_calls: NeMo's turns"),
        ({**TALK, "tools": [{"name": "f"}]}, {}, "row 0: the row's tools: NeMo's turns have no"),
        ({"text": "x"}, {"add_bos": True}, "the tokenizer has no bos token"),
    ],
)
def test_settings_that_do_not_fit_the_rows_are_refused(
    tmp_path: Path, value: Any, settings: Any, message: str
) -> None:
    with pytest.raises(NemoKDError, match=message):
        rows, _ = read(tmp_path, value, **settings)
        rows[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chat_date": "today"}, "chat_date is 'today': expected a date"),
        ({"chat_prompt_tokens": {"turn": "x"}}, "chat_prompt_tokens has 'turn': its keys are"),
        ({"reader": "nemo", "format": "messages"}, "format=messages cannot be read with reader="),
    ],
)
def test_settings_that_no_row_fits_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(NemoKDError, match=message):
        RowConfig(**settings)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"text": ""}, "no answer token"),
        ({"text": 3}, "no text in `text`"),
        ({"text": "\ud800"}, "cannot be tokenized"),
        (3, "no text in `text`"),
    ],
)
def test_a_row_without_text_is_named(tmp_path: Path, value: Any, message: str) -> None:
    rows, _ = read(tmp_path, {"text": "x"}, value, format="text")
    with pytest.raises(RowError, match=f"row 1: .*{message}"):
        rows[1]


ASKED = {"instruction": "Translate.", **PROMPT}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"instruction": "Translate."},
            r"have instruction, which the default data.prompt_template='{input} {output}' does not "
            r"read; set .* such as data.prompt_template='{instruction}\\n{input} {output}', or rem",
        ),
        ({"system": "s", "question": "q"}, r"have system, question, .*='{system}\\n{question}\\n"),
        (
            {"weight": 0},
            "have weight, .* a template reads only texts: write the rows as `messages`",
        ),
        ({"tools": [{"name": "f"}]}, "have tools, .* a template reads only texts"),
    ],
)
@pytest.mark.parametrize("settings", [{}, {"format": "prompt"}, {"reader": "nemo"}])
def test_fields_that_the_default_template_does_not_read_are_refused(
    tmp_path: Path, more: Any, message: str, settings: Any
) -> None:
    """Wherever in the file a row has one."""
    with pytest.raises(NemoKDError, match=message):
        read(tmp_path, PROMPT, [1], {**PROMPT, **more}, PROMPT, **settings)


def test_fields_that_a_template_of_ones_own_does_not_read_are_said_once(tmp_path: Path) -> None:
    rows = [{"system": "s", **ASKED, "weight": 0.5}] * 3
    _, said = read(tmp_path, *rows, prompt_template="{input}: {output}")
    assert len(said) == 1 and "have instruction, system, weight, which data.prompt" in said[0]
    reading = "{system}{instruction}{input}: {output}"
    assert read(tmp_path, {**rows[0], "weight": 1}, prompt_template=reading)[1] == []


@pytest.mark.parametrize("field", ["reasoning_content", "images", "audio", "documents"])
def test_reasoning_and_media_beside_a_prompt_are_refused(tmp_path: Path, field: str) -> None:
    with pytest.raises(NemoKDError, match=f"have {field}, which the default data.prompt_template"):
        read(tmp_path, PROMPT, {**PROMPT, field: ["x"]})


def test_what_a_truncation_takes_is_said(tmp_path: Path) -> None:
    """One row loses a part of its prompt, two all of it and a part of their answer."""
    long = "word " * 20
    rows, _ = read(
        tmp_path,
        {"input": long, "output": "a"},
        {"input": "q", "output": long},
        {"input": long, "output": long},
        PROMPT,
        length=len(gpt2_like().text_to_ids(long)),
        truncation_field="input",
    )
    seen = Seen()
    for row in range(len(rows)):
        seen.add(rows.check(row))
    assert list(seen.lines("of 4 rows", "the limit", "")) == [
        "WARNING: 3 of 4 rows are longer than the limit and are truncated; 2 of them in the "
        "answer, which is learned as if it ended there; 2 of them keep nothing of their prompt"
    ]


def test_fields_that_describe_a_row_or_are_empty_are_no_matter(tmp_path: Path) -> None:
    metadata = {"id": 3, "task": "t", "category": "c", "source": "s", "weight": 1, "system": ""}
    empty: dict[str, Any] = {
        "instruction": " ",
        "tools": [],
        "context": None,
        "history": "[]",
        "weight": "3 kg",
    }
    _, said = read(tmp_path, {**PROMPT, **metadata}, {**PROMPT, **empty})
    assert said == []


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({**PROMPT, "system": "Brief!"}, {}, "system is 'Brief!', which data.prompt_template="),
        ({**PROMPT, "train": False}, {}, "train is False, which data.prompt_template="),
        ({"text": "x", "weight": 0}, {}, "weight is 0, which a row of text does not read"),
        ({"text": " \n"}, {"format": "text"}, "no answer token: the answer is empty"),
    ],
)
def test_a_row_far_down_that_asks_for_more_than_is_read_is_refused(
    tmp_path: Path, row: Any, settings: Any, message: str
) -> None:
    """Not among the rows that are looked at when a file is opened."""
    plain = {"text": "a"} if "text" in row else PROMPT
    rows, _ = read(tmp_path, *[plain] * 1001, row, *[plain] * 998, **settings)
    rows.check(1000)
    with pytest.raises(RowError, match=f"row 1001: {message}"):
        rows.check(1001)


def test_fields_beside_a_text_are_refused_unless_the_format_is_chosen(tmp_path: Path) -> None:
    row = {"text": "Be brief! x", "system": "Be brief!"}
    with pytest.raises(NemoKDError, match=r"have system beside the text.*set data.format=text"):
        read(tmp_path, row)
    rows, said = read(tmp_path, row, format="text")
    assert texts(rows)[0] == "Be brief! x<eos>"
    assert len(said) == 1 and "have system, which data.format=text does not read" in said[0]


def test_a_text_keeps_its_beginning_token_when_it_is_cut(tmp_path: Path) -> None:
    tokenizer = with_bos()
    for side, whole in (("right", "<bos>abc"), ("left", "<bos>ef<eos>")):
        settings = {"add_bos": True, "truncation_method": side, "tokenizer": tokenizer}
        rows, said = read(tmp_path, {"text": "abcdef"}, length=4, **settings)
        assert texts(rows, 0, tokenizer)[0] == whole
        assert not any("add_bos" in line for line in said)


def test_a_beginning_token_that_only_the_tokenizer_sets_is_said(tmp_path: Path) -> None:
    for row in ({"text": "abc"}, PROMPT):
        rows, said = read(tmp_path, row, tokenizer=with_bos())
        assert len([line for line in said if "data.add_bos=true begins them with it" in line]) == 1
        assert rows[0].input_ids[0] != with_bos().bos_id
    _, said = read(tmp_path, MESSAGES, tokenizer=with_bos(), chat_template=CHAT)
    assert not any("add_bos" in line for line in said)


@pytest.mark.parametrize(
    ("row", "settings", "control", "twice"),
    [
        ({**PROMPT, "output": "b"}, {}, "", False),
        ({**PROMPT, "output": "b<eos>"}, {}, "<eos>", True),
        ({**PROMPT, "output": "b<eos>"}, {"add_eos": False}, "<eos>", False),
        ({**PROMPT, "input": "a<eos>b"}, {}, "<eos>", False),
        ({**PROMPT, "note": "<eos>"}, {}, "", False),
        ({"text": "x<eos>"}, {}, "<eos>", True),
        (MESSAGES, {"chat_template": CHAT}, "", False),
        (
            {"messages": [{"role": "user", "content": "q<eos>"}, MESSAGES["messages"][1]]},
            {"chat_template": CHAT},
            "<eos>",
            False,
        ),
    ],
)
def test_control_tokens_in_a_rows_text_are_noticed(
    tmp_path: Path, row: Any, settings: Any, control: str, twice: bool
) -> None:
    rows, _ = read(tmp_path, row, **settings)
    found = rows.check(0)
    assert (found.control, found.twice) == (control, twice)


@pytest.mark.parametrize("sides", [{"rstrip": True}, {"lstrip": True, "rstrip": True}])
def test_a_token_keeps_the_spaces_that_it_takes(sides: Any, tmp_path: Path) -> None:
    """Also where it stands in for another token that the tokenizer lacks."""
    backend = Tokenizer.from_str(gpt2_like().tokenizer.backend_tokenizer.to_str())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=AddedToken("<end>", special=True, **sides),
    )
    tokenizer.save_pretrained(tmp_path)
    own: Any = AutoTokenizer.from_pretrained(tmp_path)
    text = "a  <end>\n b <end>"
    assert HFTokenizer(tmp_path).text_to_ids(text) == own(text, add_special_tokens=False).input_ids
    assert own.decode(own(text).input_ids) != text  # the spaces are gone


def test_a_truncation_field_that_the_template_lacks_is_refused_with_one_that_it_has(
    tmp_path: Path,
) -> None:
    row, template = {"question": "abcdef", "output": "xy"}, "{question}{output}"
    with pytest.raises(NemoKDError, match=r"no field 'input'; set data.truncation_field=question"):
        read(tmp_path, row, prompt_template=template)


@pytest.mark.parametrize("answer", ["", " ", "\n"])
@pytest.mark.parametrize("template", ["{input} {output}", "{input}{output}"])
def test_an_empty_answer_is_none_whatever_space_the_template_puts_before_it(
    tmp_path: Path, answer: str, template: str
) -> None:
    rows, _ = read(tmp_path, {**PROMPT, "output": answer}, prompt_template=template)
    with pytest.raises(NoAnswerError, match="row 0: no answer token: the answer is empty"):
        rows[0]


def test_last_assistant_does_not_fit_a_loss_on_every_token(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(MESSAGES) + "\n")
    model = Model(tokenizer=gpt2_like(), max_seq_length=100, answer_only_loss=False)
    for train_on in ("all", "all_assistant", "last_assistant"):
        config = RowConfig(train_on=train_on, chat_template=CHAT)
        if train_on == "last_assistant":
            with pytest.raises(NemoKDError, match="does not work with answer_only_loss=false"):
                open_rows(config, JsonlFile(file), model)
        else:
            assert open_rows(config, JsonlFile(file), model)[0].loss_mask[1:].all()


def test_what_nemos_turns_cannot_hold_is_refused_with_nemos_reader_too(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(turns_with(1, weight=0)) + "\n")
    model = Model(tokenizer=gpt2_like(), max_seq_length=100)
    config, verbatim = RowConfig(reader="nemo"), RowConfig(chat=True)
    nemos = open_rows(verbatim, JsonlFile(file), model).encode
    rows = open_rows(config, JsonlFile(file), model, nemos=lambda config, model: nemos)
    with pytest.raises(RowError, match="turn 1: weight 0"):
        rows[0]
