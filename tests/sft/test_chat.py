"""Options of chat templates: what is learned, what is cut, kwargs, dates, files, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_kd.sft import RowError
from nemo_kd.sft.chat import ChatTemplate
from nemo_kd.sft.chat_template import chat_template_of, read_chat_template
from nemo_kd.sft.messages import conversation_of
from nemo_kd.sft.rows import NoAnswerError
from nemo_kd.sft.template import TemplateError
from tests.sft.chats import (
    TEMPLATES,
    Fast,
    assistant,
    call,
    chat_template,
    learned,
    shown,
    single_bytes,
    system,
    user,
)

END = "<|im_end|>"
ROW = {"messages": [system("s"), user("a"), assistant("b"), user("c"), assistant("d"), user("e")]}


def with_text(text: str, **settings: Any) -> ChatTemplate:
    """A template of the given text over the tokens of `generation`."""
    tokenizer = Fast(single_bytes("generation"))
    return ChatTemplate(tokenizer=tokenizer, template=text, max_seq_length=1 << 30, **settings)


@pytest.mark.parametrize("name", ["generation", "qwen3"])
@pytest.mark.parametrize(
    ("train_on", "weights", "expected"),
    [
        ("all_assistant", {}, ["b", "d"]),
        ("last_assistant", {}, ["d"]),
        ("all_assistant", {2: 0, 4: 1}, ["d"]),
        ("all_assistant", {1: 0, 4: 0}, ["b"]),
    ],
)
def test_turns_to_learn(
    name: str, train_on: str, weights: dict[int, int], expected: list[str]
) -> None:
    messages = [
        {**message, "weight": weights[i]} if i in weights else message
        for i, message in enumerate(ROW["messages"])
    ]
    found = learned(chat_template(name, train_on=train_on), {"messages": messages})
    assert found == [text + END for text in expected]


@pytest.mark.parametrize("name", ["generation", "qwen3"])
def test_train_on_all_learns_every_position_but_turns_of_weight_0(name: str) -> None:
    chat = chat_template(name, train_on="all")
    assert chat(conversation_of(ROW)).loss_mask.all()
    row = {"messages": [user("a"), assistant("b", weight=0), user("c")]}
    assert shown(chat, row) == (
        f"⟦<|im_start|>user\na{END}\n<|im_start|>assistant\n⟧b{END}⟦\n<|im_start|>user\nc{END}\n⟧"
    )


@pytest.mark.parametrize("messages", [[user("a")], [user("a"), assistant("b", weight=0)]])
def test_a_conversation_without_a_learned_turn(messages: list[Any]) -> None:
    with pytest.raises(NoAnswerError, match="no assistant turn is learned"):
        chat_template("qwen3")(conversation_of({"messages": messages}))


@pytest.mark.parametrize("name", ["generation", "qwen3"])
def test_empty_assistant_turns_are_not_learned_and_it_is_said_once(name: str) -> None:
    notices: list[str] = []
    chat = chat_template(name, say=notices.append)
    row = {"messages": [user("a"), assistant(" \n"), user("c"), assistant("d")]}
    assert [learned(chat, row)[0][-11:] for _ in range(2)] == [f"d{END}"] * 2
    assert [len(learned(chat, row)), len(notices)] == [1, 1] and "without content" in notices[0]
    for empty in (assistant(""), assistant("", reasoning_content=" "), assistant("", weight=1)):
        with pytest.raises(NoAnswerError, match="or they are empty"):
            chat(conversation_of({"messages": [user("a"), empty]}))


def test_a_last_turn_that_is_empty_is_not_replaced_by_another() -> None:
    row = {"messages": [user("a"), assistant("b"), user("c"), assistant("")]}
    with pytest.raises(NoAnswerError, match="or they are empty"):
        chat_template("qwen3", train_on="last_assistant")(conversation_of(row))
    assert chat_template("qwen3", train_on="all")(conversation_of(row)).loss_mask.all()


def test_weight_0_of_a_user_is_an_error_if_every_token_is_learned() -> None:
    row = {"messages": [user("a", weight=0), assistant("b")]}
    assert learned(chat_template("qwen3"), row)
    with pytest.raises(RowError, match=r"message 0 \(user\) has weight 0, but every token is"):
        chat_template("qwen3", train_on="all")(conversation_of(row))


def test_weight_1_of_a_user_is_an_error() -> None:
    row = {"messages": [user("a", weight=1), assistant("b")]}
    with pytest.raises(RowError, match=r"message 0 \(user\) has weight 1"):
        chat_template("qwen3")(conversation_of(row))
    assert chat_template("qwen3", train_on="all")(conversation_of(row)).loss_mask.all()


@pytest.mark.parametrize("name", ["generation", "generation_no_end"])
def test_generation_blocks_are_transformers_own_mask(name: str) -> None:
    chat, notices = chat_template(name), list[str]()
    chat = chat_template(name, say=notices.append)
    messages = [user("é\n"), assistant("b😀\n"), user("c"), assistant("d")]
    for _ in range(2):
        made = chat(conversation_of({"messages": messages}))
    theirs = chat.tokenizer.tokenizer.apply_chat_template(  # type: ignore[attr-defined]
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    assert made.input_ids == theirs["input_ids"]
    assert made.loss_mask.tolist() == theirs["assistant_masks"]
    assert [notice[:23] for notice in notices] == ["the {% generation %} bl"][
        : name.endswith("end")
    ]


def test_generation_blocks_that_are_not_one_for_each_turn() -> None:
    """All of them can be learned; which belongs to a turn is not known."""
    text = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<|im_start|>"
        "{% endgeneration %}: {% generation %}{{ m.content }}{% endgeneration %}{% else %}"
        "{{ m.content }}{% endif %}{% endfor %}"
    )
    row = {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}
    assert learned(with_text(text), row) == ["<|im_start|>", "b", "<|im_start|>", "d"]
    with pytest.raises(RowError, match=r"4 .* blocks for 2 assistant turns"):
        with_text(text, train_on="last_assistant")(conversation_of(row))


@pytest.mark.parametrize("name", ["qwen3", "mistral", "llama3", "harmony"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("unit", ["token", "turn"])
def test_cut_to_every_length(name: str, side: str, unit: str) -> None:
    """Against the definition: the most messages whose rendering fits; tokens off one end."""
    firsts = 0 if name in ("harmony", "mistral") else 1
    messages = ROW["messages"][1 - firsts :]
    conversation = conversation_of({"messages": messages})
    uncut = chat_template(name)
    whole = uncut(conversation)
    starts = [i for i, m in enumerate(messages) if m["role"] == "user" and i > firsts]
    parts = (
        [messages[:size] for size in range(len(messages) - 1, 0, -1)]
        if side == "right"
        else [messages[:firsts] + messages[start:] for start in starts]
    )
    for limit in range(1, len(whole.input_ids) + 2, 5):
        chat = chat_template(name, max_seq_length=limit, truncation_method=side, truncate_at=unit)
        if limit >= len(whole.input_ids):
            assert chat(conversation).input_ids == whole.input_ids
            continue
        if unit == "token":
            kept = slice(-limit, None) if side == "left" else slice(limit)
            made = chat(conversation)
            assert made.truncated and made.input_ids == whole.input_ids[kept]
            assert np.array_equal(made.loss_mask, whole.loss_mask[kept])
            continue
        fitting = (tokens for part in parts if len(tokens := rendered(uncut, part)) <= limit)
        expected = next(fitting, None)
        try:
            made = chat(conversation)
        except NoAnswerError as error:
            assert "no assistant turn fits" in str(error)
            assert expected is None or b"b" not in bytes(i for i in expected if i < 256)
            continue
        assert made.truncated and made.loss_mask.any() and made.input_ids == expected


def rendered(chat: ChatTemplate, messages: list[Any], text: str | None = None) -> list[int]:
    library = chat.tokenizer.tokenizer  # type: ignore[attr-defined]
    date = {"strftime_now": lambda _: "26 Jul 2024"}
    return list(library.apply_chat_template(messages, chat_template=text, **date))


def test_the_most_messages_are_kept_where_fewer_are_longer() -> None:
    """A template that writes instructions after a last question: with its answer it is shorter."""
    text = (
        "{% for m in messages %}<|im_start|>{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
        "{% endfor %}{% if messages[-1].role == 'user' %}{{ 'x' * 60 }}{% endif %}"
    )
    messages = [user("a"), assistant("b"), user("c"), assistant("d"), user("e")]
    conversation = conversation_of({"messages": messages})
    for side in ("left", "right"):
        chat = with_text(text, truncation_method=side, truncate_at="turn")
        chat = replace(chat, max_seq_length=len(rendered(chat, messages[:4], text)))
        if side == "right":
            assert chat(conversation).input_ids == rendered(chat, messages[:4], text)
        else:
            with pytest.raises(NoAnswerError):
                chat(conversation)


def test_a_last_turn_that_is_cut_off_is_not_replaced_by_another() -> None:
    chat = chat_template("qwen3", max_seq_length=50, truncate_at="turn", train_on="last_assistant")
    with pytest.raises(NoAnswerError, match="no assistant turn fits"):
        chat(conversation_of(ROW))


def test_kwargs_reach_the_template() -> None:
    chat = chat_template("qwen3", kwargs={"enable_thinking": False})
    row = {"messages": [user("a"), assistant("b")]}
    assert shown(chat, row).endswith(f"assistant\n<think>\n\n</think>\n\n⟦b{END}⟧\n")


def test_tools_of_the_kwargs_serve_rows_without_tools() -> None:
    chat = chat_template("qwen3", kwargs={"tools": [{"name": "sum"}]})
    row: dict[str, Any] = {"messages": [user("a"), assistant("b")]}
    assert '<tools>\n{"name": "sum"}\n</tools>' in shown(chat, row)
    assert '<tools>\n{"name": "own"}\n</tools>' in shown(chat, {**row, "tools": [{"name": "own"}]})


def test_kwargs_that_would_replace_the_conversation_are_refused() -> None:
    with pytest.raises(TemplateError, match=r"chat_template_kwargs\.messages cannot be set"):
        chat_template("qwen3", kwargs={"messages": []})


def test_kwargs_that_the_template_does_not_read_are_refused() -> None:
    with pytest.raises(TemplateError, match=r"enable_thinkng: the chat template does not read it"):
        chat_template("qwen3", kwargs={"enable_thinkng": False})


def test_generation_blocks_around_a_user_are_an_error() -> None:
    text = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    with pytest.raises(RowError, match=r"message 0 \(user\) is in a {% generation %} block"):
        with_text(text)(conversation_of({"messages": [user("question"), assistant("b")]}))


def test_arguments_as_json_for_templates_that_write_text() -> None:
    """As published for DeepSeek V3; the text is the row's own, its spaces included."""
    text = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments }}{% endfor %}"
        "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    one = call("f")
    one["function"]["arguments"] = '{ "x":1 }'
    row = {"messages": [user("a"), assistant("", tool_calls=[one])]}
    assert learned(with_text(text), row) == ['f{ "x":1 }<|im_end|>']


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [('{"c": "P", "b": true}', '{"c": "P", "b": true}'), ({"c": "P"}, "{'c': 'P'}")],
)
def test_arguments_that_a_template_writes_are_those_of_transformers(
    arguments: Any, expected: str
) -> None:
    """JSON text stays as it is; of an object transformers writes Python's form."""
    text = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments }}"
        "{% endfor %}{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    one = call("f")
    one["function"]["arguments"] = arguments
    messages = [user("a"), assistant("", tool_calls=[one])]
    chat = with_text(text)
    own = chat.tokenizer.tokenizer.apply_chat_template(  # type: ignore[attr-defined]
        messages, chat_template=text, tokenize=False
    )
    assert own.endswith(f"f{expected}<|im_end|>")
    assert learned(chat, {"messages": messages}) == [f"f{expected}<|im_end|>"]


def test_todays_date_is_a_fixed_one_and_said_once() -> None:
    notices: list[str] = []
    chat = chat_template("llama3", date="2025-02-03", say=notices.append)
    row = {"messages": [user("a"), assistant("b")]}
    assert "Today Date: 03 Feb 2025\n" in shown(chat, row) + shown(chat, row)
    assert notices == ["the chat template asks for today's date: it gets data.chat_date=2025-02-03"]
    fixed = chat_template("llama3", kwargs={"date_string": "1 May"}, say=notices.append)
    assert "Today Date: 1 May\n" in shown(fixed, row) and len(notices) == 1


@pytest.mark.parametrize(
    ("setting", "value"),
    [("date", "yesterday"), ("train_on", "user"), ("truncate_at", "word")],
)
def test_settings_that_are_unknown_are_refused(setting: str, value: str) -> None:
    with pytest.raises(TemplateError, match=value):
        chat_template("llama3", **{setting: value})


def test_a_reasoning_that_the_template_leaves_out_is_said_once() -> None:
    notices: list[str] = []
    chat = chat_template("qwen3", say=notices.append)
    one = assistant("b", reasoning_content="because")
    for _ in range(2):
        shown(chat, {"messages": [user("a"), one, user("c"), assistant("d")]})
    assert len(notices) == 1 and "leaves out the reasoning_content" in notices[0]
    shown(
        chat, {"messages": [user("a"), assistant("<think>so</think>b"), user("c"), assistant("d")]}
    )
    assert len(notices) == 2 and "leaves out the reasoning in the content" in notices[1]


@pytest.mark.parametrize(
    "text",
    [
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ undefined.attribute }}",
        "{{ 1 // 0 }}",
        "{{ messages[0].content + 1 }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ raise_exception('no é') }}",
    ],
)
def test_templates_reach_nothing_and_their_errors_are_errors_of_the_row(text: str) -> None:
    with pytest.raises(RowError, match=r"the chat template refuses the conversation: ."):
        with_text(text)(conversation_of(ROW))


@pytest.mark.parametrize(
    "text", ["{{ strftime_now.__globals__ }}", "{{ '{0.__class__}'.format(messages) }}"]
)
def test_what_the_sandbox_hides_is_empty(text: str) -> None:
    assert with_text(text)._render([user("a")], None) == ""


def test_bad_syntax_is_an_error_of_the_template() -> None:
    with pytest.raises(TemplateError, match=r"cannot be compiled: unexpected '}' \(line 2\)"):
        with_text("{% for m in messages %}\n{{ m }")


@pytest.mark.parametrize("form", ["tokenizer_config", "jinja", "json", "named"])
def test_a_tokenizers_own_template(tmp_path: Path, form: str) -> None:
    """Where transformers puts it, beside the tokenizer, and as one of several by name."""
    from nemo_kd.sft.tokenizer import HFTokenizer

    tokenizer = single_bytes("qwen3")
    text = tokenizer.chat_template
    tokenizer.chat_template = {
        "tokenizer_config": text,
        "named": {"default": "none", "tool_use": text},
    }.get(form)
    tokenizer.save_pretrained(tmp_path)
    if form == "jinja":
        (tmp_path / "chat_template.jinja").write_text(text)
    if form == "json":
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": text}))
    ours = HFTokenizer(tmp_path)
    found = chat_template_of(ours)
    assert found == ({"default": "none", "tool_use": text} if form == "named" else text)
    chat = ChatTemplate(tokenizer=ours, template=found, max_seq_length=1000)
    row = {
        "messages": [user("a"), assistant("", tool_calls=[call("add", a=1)])],
        "tools": [{"name": "add"}],
    }
    theirs = ours.tokenizer.apply_chat_template(
        row["messages"], tools=row["tools"], chat_template=text
    )
    assert list(chat(conversation_of(row)).input_ids) == theirs


def test_a_tokenizer_without_template_is_refused() -> None:
    tokenizer = single_bytes("qwen3")
    tokenizer.chat_template = None
    with pytest.raises(TemplateError, match=r"data\.chat_template=FILE"):
        chat_template_of(Fast(tokenizer))


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    path = TEMPLATES / "gemma.jinja"
    assert read_chat_template(path) == path.read_text()
    for content in ('{"chat_template": 3}', "{}", "[", '{"chat_template": [{"name": "x"}]}'):
        (tmp_path / "t.json").write_text(content)
        with pytest.raises(TemplateError, match=r"t\.json"):
            read_chat_template(tmp_path / "t.json")
    with pytest.raises(TemplateError, match="missing"):
        read_chat_template(tmp_path / "missing.jinja")


@pytest.mark.parametrize("name", ["generation", "mistral", "qwen3"])
def test_a_million_characters(name: str) -> None:
    text = "word é\n" * 140_000
    made = chat_template(name)(conversation_of({"messages": [user("a"), assistant(text)]}))
    assert made.loss_mask.sum() > 1_100_000


def test_ten_thousand_turns() -> None:
    """In time linear in their number: one by one they would take an hour."""
    messages = [user("a\U0010f000"), assistant("b")] * 5000  # a private-use character, as marks are
    made = chat_template("qwen3")(conversation_of({"messages": messages}))
    assert made.loss_mask.sum() == 5000 * 2 + 6  # "b" and its end; the last with empty reasoning


def test_lone_surrogates_are_an_error_of_the_row() -> None:
    row = {"messages": [user("a"), assistant("b\ud83d")]}
    with pytest.raises(RowError, match="lone surrogate"):
        chat_template("qwen3")(conversation_of(row))
