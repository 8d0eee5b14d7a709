"""What a chat template leaves out of a conversation: messages and tools are errors of the row."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_kd.sft import RowError
from nemo_kd.sft.chat import ChatTemplate
from nemo_kd.sft.messages import conversation_of
from nemo_kd.sft.template import TemplateError
from tests.sft.chats import (
    Fast,
    assistant,
    call,
    chat_template,
    learned,
    single_bytes,
    system,
    tool,
    user,
)

NO_SYSTEM = (  # as published for Phi-3 mini
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>' + m.content + '<|im_end|>"
    "<|im_start|>' }}{% elif m.role == 'assistant' %}{{ m.content + '<|im_end|>' }}{% endif %}"
    "{% endfor %}"
)
EVERY_ROLE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OF_MESSAGES = "{% if messages[0].tools %}{{ messages[0].tools }}{% endif %}" + EVERY_ROLE
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


def with_text(text: str, **settings: Any) -> ChatTemplate:
    tokenizer = Fast(single_bytes("generation"))
    return ChatTemplate(tokenizer=tokenizer, template=text, max_seq_length=1 << 30, **settings)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([system("Answer in French."), user("hi"), assistant("yo")], r"0 \(system\)"),
        ([user("t?"), assistant("let me see"), tool("22"), assistant("22 °C")], r"2 \(tool\)"),
        ([{"role": "developer", "content": "u"}, user("u"), assistant("u")], r"0 \(developer\)"),
    ],
)
@pytest.mark.parametrize("train_on", ["all_assistant", "all"])
def test_a_message_that_the_template_leaves_out_is_an_error(
    messages: list[Any], message: str, train_on: str
) -> None:
    """Also if its words are elsewhere in the text."""
    conversation = conversation_of({"messages": messages})
    with pytest.raises(RowError, match=f"message {message}: the chat template leaves it out; rem"):
        with_text(NO_SYSTEM, train_on=train_on)(conversation)
    assert with_text(EVERY_ROLE)(conversation).loss_mask.any()


def test_a_system_prompt_that_is_written_before_a_last_question_only_is_an_error() -> None:
    """As Mistral's template does: no conversation that ends with an answer has it."""
    messages = [system("Be brief."), user("a"), assistant("b")]
    with pytest.raises(RowError, match=r"message 0 \(system\): the chat template leaves it out"):
        chat_template("mistral")(conversation_of({"messages": messages}))
    assert learned(chat_template("mistral"), {"messages": [*messages, user("c")]}) == [" b</s>"]


@pytest.mark.parametrize("text", [EVERY_ROLE, OF_MESSAGES])
def test_tools_that_the_template_leaves_out_are_an_error(text: str) -> None:
    """Also if it reads another variable of this name."""
    row = {"messages": [user("a"), assistant("b")], "tools": TOOLS}
    with pytest.raises(RowError, match=r"leaves out the row's tools; remove them, or set"):
        with_text(text)(conversation_of(row))
    with pytest.raises((RowError, TemplateError), match=r"data\.chat_template_kwargs\.tools"):
        with_text(text, kwargs={"tools": TOOLS})(conversation_of({**row, "tools": None}))


@pytest.mark.parametrize("name", ["qwen3", "llama3", "mistral", "cohere", "harmony", "deepseek"])
def test_what_published_templates_write_is_no_error(name: str) -> None:
    """Results of tools as text or JSON, with quotes, spaces around them and private characters."""
    steps = [tool(' {"t": "22 \U0010f000"}\n'), assistant("é"), user("\t‘ok’ 'no' \\ \n")]
    row = {"messages": [user(" x "), assistant("", tool_calls=[call("weather", a=1)]), *steps]}
    if name in ("harmony", "deepseek", "cohere"):  # these write no calls, or no tools
        row = {"messages": [system(" S\n\n"), user(" x "), assistant("y"), user(" ")]}
        assert chat_template(name)(conversation_of(row)).loss_mask.any()
        return
    assert chat_template(name)(conversation_of({**row, "tools": TOOLS})).loss_mask.any()
