"""Which tokens of a conversation are learned, by template: expectations written by hand, in ⟦⟧."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_kd.sft import RowError
from nemo_kd.sft.many_turns import find_turns
from nemo_kd.sft.messages import conversation_of
from nemo_kd.sft.rows import NoAnswerError
from tests.sft.chats import (
    SPECIAL,
    assistant,
    call,
    chat_template,
    learned,
    shown,
    system,
    tool,
    user,
)

CHATS = {name: chat_template(name) for name in SPECIAL}
ADD = {"type": "function", "function": {"name": "add", "description": "sum", "parameters": {}}}
ADD_TEXT = (
    '{"type": "function", "function": {"name": "add", "description": "sum", "parameters": {}}}'
)

# Two turns, the first of which ends in a newline.
TURNS = [user("a"), assistant("b\n"), user("é"), assistant("c")]
EXPECTED = {
    "alpaca": "### Instruction:\na\n\n### Response:\n⟦b\n</s>⟧\n\n"
    "### Instruction:\né\n\n### Response:\n⟦c</s>⟧\n\n",
    "cohere": "<BOS><|START|><|SYSTEM|>You are helpful.<|END|><|START|><|USER|>a<|END|>"
    "<|START|><|CHATBOT|><|RESPONSE|>⟦b\n<|END_RESPONSE|><|END|>⟧<|START|><|USER|>é<|END|>"
    "<|START|><|CHATBOT|><|RESPONSE|>⟦c<|END_RESPONSE|><|END|>⟧<|START|><|CHATBOT|>",
    "deepseek": "<｜begin▁of▁sentence｜><｜User｜>a<｜Assistant｜>⟦b\n<｜end▁of▁sentence｜>⟧"
    "<｜User｜>é<｜Assistant｜>⟦c<｜end▁of▁sentence｜>⟧",
    "ends_once": "USER: a\nASSISTANT: ⟦b\n⟧\nUSER: é\nASSISTANT: ⟦c\n</s>⟧",
    "gemma": "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\n⟦b<end_of_turn>⟧\n"
    "<start_of_turn>user\né<end_of_turn>\n<start_of_turn>model\n⟦c<end_of_turn>⟧\n",
    "generation": "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b\n<|im_end|>⟧\n"
    "<|im_start|>user\né<|im_end|>\n<|im_start|>assistant\n⟦c<|im_end|>⟧\n",
    "generation_no_end": "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b\n⟧<|im_end|>\n"
    "<|im_start|>user\né<|im_end|>\n<|im_start|>assistant\n⟦c⟧<|im_end|>\n",
    "harmony": "<|start|>user<|message|>a<|end|>"
    "<|start|>assistant⟦<|channel|>final<|message|>b\n<|end|>⟧<|start|>user<|message|>é<|end|>"
    "<|start|>assistant⟦<|channel|>final<|message|>c<|return|>⟧",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦b<|eot_id|>⟧"
    "<|start_header_id|>user<|end_header_id|>\n\né<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦c<|eot_id|>⟧",
    "mistral": "<s>[INST] a[/INST]⟦ b</s>⟧[INST] é[/INST]⟦ c</s>⟧",
    "qwen3": "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b\n<|im_end|>⟧\n"
    "<|im_start|>user\né<|im_end|>\n<|im_start|>assistant\n"
    "⟦<think>\n\n</think>\n\nc<|im_end|>⟧\n",
}


@pytest.mark.parametrize("name", SPECIAL)
def test_every_turn_is_learned_with_its_end(name: str) -> None:
    assert shown(CHATS[name], {"messages": TURNS}) == EXPECTED[name]


@pytest.mark.parametrize("name", SPECIAL)
def test_a_conversation_may_end_with_a_user_turn(name: str) -> None:
    """The turns before it keep their text, and their end where the template gives them one."""
    found = learned(CHATS[name], {"messages": [*TURNS[:2], user("thanks")]})
    first = "b\n" if name == "ends_once" else EXPECTED[name].split("⟦")[1].split("⟧")[0]
    assert found == [first]


@pytest.mark.parametrize("name", sorted({*SPECIAL} - {"gemma", "mistral"}))
def test_assistant_turns_may_come_first_and_follow_each_other(name: str) -> None:
    found = learned(CHATS[name], {"messages": [assistant("x"), user("y"), *map(assistant, "zx")]})
    text = "".join(found)
    assert len(found) == 3 and "y" not in text and "user" not in text.lower()
    assert [one.count(said) for one, said in zip(found, "xzx", strict=True)] == [1, 1, 1]


@pytest.mark.parametrize("name", ["gemma", "mistral"])
def test_what_a_template_refuses_is_an_error_in_its_words(name: str) -> None:
    with pytest.raises(RowError, match=r"roles must alternate.*data.chat_template=FILE"):
        CHATS[name](conversation_of({"messages": [assistant("x"), user("y")]}))


@pytest.mark.parametrize("prompt", ["", "s"])
def test_system_prompts_stay_as_they_are(prompt: str) -> None:
    row = {"messages": [system(prompt), user("a"), assistant("b")]}
    assert shown(CHATS["qwen3"], row) == (
        f"<|im_start|>system\n{prompt}<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nb<|im_end|>⟧\n"
    )


def test_without_system_prompt_a_template_may_write_its_own() -> None:
    """And what precedes the last question changes with the messages that follow."""
    row = {"messages": [system("s"), user("b"), assistant("b"), user("b")]}
    assert shown(CHATS["mistral"], row) == "<s>[INST] b[/INST]⟦ b</s>⟧[INST] s\n\nb[/INST]"


def test_earlier_reasoning_is_dropped_and_the_last_turns_learned() -> None:
    row = {
        "messages": [
            user("c"),
            assistant("<think>\nr1\n</think>\n\nd"),
            user("x"),
            assistant("e", reasoning_content="r2"),
        ]
    }
    assert shown(CHATS["qwen3"], row) == (
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n⟦d<|im_end|>⟧\n"
        "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\nr2\n</think>\n\ne<|im_end|>⟧\n"
    )


def test_a_reasoning_skipped_by_the_generation_prompt_is_not_learned() -> None:
    """The prompt of the last turn has the empty block; the earlier turn never had one."""
    chat = chat_template("qwen3", kwargs={"enable_thinking": False})
    row = {"messages": [user("a"), assistant("<b>"), user("c"), assistant("<d>")]}
    assert shown(chat, row) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦<b><|im_end|>⟧\n"
        "<|im_start|>user\nc<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦<d><|im_end|>⟧\n"
    )


def test_a_reasoning_opened_by_the_generation_prompt() -> None:
    """R1's template opens it in the prompt, and leaves it out of every turn."""
    row = {"messages": [user("a"), assistant("<think>r</think>b"), user("c"), assistant("d")]}
    assert learned(CHATS["deepseek"], row) == [
        "b<｜end▁of▁sentence｜>",
        "d<｜end▁of▁sentence｜>",
    ]


def test_the_last_turn_keeps_its_analysis() -> None:
    row = {
        "messages": [
            user("a"),
            assistant("b", thinking="r"),
            user("c"),
            assistant("d", thinking="q"),
        ]
    }
    assert learned(CHATS["harmony"], row) == [
        "<|channel|>final<|message|>b<|end|>",
        "<|channel|>analysis<|message|>q<|end|><|start|>assistant"
        "<|channel|>final<|message|>d<|return|>",
    ]


def with_tools(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(messages), "tools": [ADD]}


STEPS = with_tools(
    user("1+1?"),
    assistant(None, tool_calls=[call("add", a=1)]),
    tool("2"),
    assistant("2"),
    user("and é?"),
    assistant("", tool_calls=[call("add", a="é")]),
)


def test_tool_calls_of_mistral() -> None:
    assert shown(CHATS["mistral"], STEPS) == (
        '<s>[INST] 1+1?[/INST]⟦[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]</s>⟧'
        '[TOOL_RESULTS] {"content": "2"}[/TOOL_RESULTS]⟦ 2</s>⟧'
        f"[AVAILABLE_TOOLS] [{ADD_TEXT}][/AVAILABLE_TOOLS][INST] and é?[/INST]"
        '⟦[TOOL_CALLS] [{"name": "add", "arguments": {"a": "é"}}]</s>⟧'
    )


def test_tool_calls_of_llama3() -> None:
    assert learned(CHATS["llama3"], STEPS) == [
        '{"name": "add", "parameters": {"a": 1}}<|eot_id|>',
        "2<|eot_id|>",
        '{"name": "add", "parameters": {"a": "é"}}<|eot_id|>',
    ]


def test_tool_calls_of_qwen3_with_content_and_reasoning() -> None:
    """Reasoning between the calls of one question stays; that of the question before is dropped."""
    row = with_tools(
        user("1+1?"),
        assistant("<think>r1</think>\n\n", tool_calls=[call("add", a=1), call("add", a=2)]),
        tool("2"),
        tool("3"),
        assistant("so 2", reasoning_content="r2"),
        user("and?"),
        assistant("calls", tool_calls=[call("add", a=3)], reasoning_content="r3"),
        tool("4"),
        assistant("4"),
    )
    one, two, three, four = learned(CHATS["qwen3"], row)
    assert one == (
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>'
    )
    assert two == "so 2<|im_end|>"
    assert three == (
        "<think>\nr3\n</think>\n\ncalls\n"
        '<tool_call>\n{"name": "add", "arguments": {"a": 3}}\n</tool_call><|im_end|>'
    )
    assert four == "<think>\n\n</think>\n\n4<|im_end|>"


@pytest.mark.parametrize("name", ["alpaca", "deepseek", "gemma", "generation", "harmony", "llama3"])
def test_what_a_template_leaves_out_is_an_error(name: str) -> None:
    """Llama 3's leaves out the text beside a call; others know no calls."""
    row = with_tools(user("1"), assistant("text", tool_calls=[call("add", a=1)]))
    with pytest.raises(RowError, match=r"message 1: .*leaves out or changes"):
        CHATS[name](conversation_of(row))


@pytest.mark.parametrize("name", SPECIAL)
def test_special_tokens_inside_contents_are_text_of_the_turn(name: str) -> None:
    """They are parsed, as everywhere in transformers, and do not move the masks."""
    marks = "".join(SPECIAL[name]).replace("<think>", "").replace("</think>", "")
    row = {"messages": [user(f"u{marks}v"), assistant(f"x{marks}y"), user("w")]}
    (found,) = learned(CHATS[name], row)
    assert f"x{marks}y" in found and "u" not in found.partition("x")[0].replace("user", "")


@pytest.mark.parametrize("first", ["", "b"])
def test_a_header_of_an_earlier_turn_is_not_taken(first: str) -> None:
    """The template's header before answers is not its generation prompt: refused, not guessed."""
    row = {"messages": [user("a"), assistant(first), user("c"), assistant("d")]}
    with pytest.raises(RowError, match="its place in the rendered conversation is not clear"):
        chat_template("indented")(conversation_of(row))


def test_a_dropped_call_is_an_error_if_its_name_is_in_the_words() -> None:
    one = assistant("I will add 1.", tool_calls=[call("add", a=1)])
    for name in ("generation", "deepseek", "harmony"):
        with pytest.raises(RowError, match=r"'add' is not in .* leaves out or changes"):
            CHATS[name](conversation_of(with_tools(user("1"), one)))


@pytest.mark.parametrize("name", ["f", "final", "message"])
def test_a_dropped_call_is_an_error_if_its_name_is_in_the_header(name: str) -> None:
    row = with_tools(user("1"), assistant("", tool_calls=[call(name, a=1)]))
    with pytest.raises(RowError, match="leaves out or changes"):
        CHATS["harmony"](conversation_of(row))


TEXT = st.text(st.sampled_from("ab \n\r\t<>|é😀ش\u200f\u00a0\u2028{}%"), max_size=12)


@pytest.mark.parametrize("name", SPECIAL)
@settings(deadline=None, max_examples=60)
@given(contents=st.lists(TEXT, min_size=2, max_size=7))
def test_random_conversations_learn_exactly_the_assistants_words(
    name: str, contents: list[str]
) -> None:
    """Users and assistants in turn; learned is each answer with words, with the template's end."""
    messages = [(user, assistant)[i % 2](text) for i, text in enumerate(contents)]
    chat = CHATS[name]
    if not any(text.strip() for text in contents[1::2]):
        with pytest.raises(NoAnswerError):
            chat(conversation_of({"messages": messages}))
        return
    made = chat(conversation_of({"messages": messages}))
    assert list(made.input_ids) == chat.tokenizer.tokenizer.apply_chat_template(  # type: ignore[attr-defined]
        messages, strftime_now=lambda _: "26 Jul 2024"
    )
    ids = [token for token, mask in zip(made.input_ids, made.loss_mask, strict=True) if mask]
    answers = [
        said(name, text, 2 * i + 2 == len(contents))
        for i, text in enumerate(contents[1::2])
        if text.strip()
    ]
    assert chat.tokenizer.ids_to_text(ids) == "".join(answers)


MESSAGE = st.one_of(
    st.builds(user, TEXT),
    st.builds(assistant, TEXT),
    st.builds(lambda text: assistant(text, reasoning_content="why", thinking="why"), TEXT),
    st.builds(lambda text: assistant(f"<think>how</think>{text}"), TEXT),
    st.builds(lambda text: assistant(text, tool_calls=[call("add", a=text)]), TEXT),
    st.builds(tool, TEXT),
)


@pytest.mark.parametrize("name", SPECIAL)
@settings(deadline=None, max_examples=60)
@given(messages=st.lists(MESSAGE, min_size=1, max_size=7))
def test_turns_found_together_are_those_found_one_by_one(
    name: str, messages: list[dict[str, Any]]
) -> None:
    """In whatever order speakers come; what one way refuses, the other refuses as well."""
    conversation = conversation_of({"messages": [user("first"), *messages]})
    chat = CHATS[name]
    try:
        text = chat._render(conversation.messages, None)
    except RowError:
        return
    found: list[Any] = []
    for many in (0, len(messages)):
        try:
            turns = conversation.assistant_turns()
            found.append(find_turns(chat._finder, conversation, text, turns, many))
        except RowError:
            found.append("refused")
    assert found[0] == found[1]


def said(name: str, text: str, last: bool) -> str:
    """What a template makes of an answer."""
    if name in ("gemma", "llama3", "mistral"):
        text = text.strip()
    end = {
        "ends_once": "\n</s>" if last else "",
        "generation_no_end": "",
        "cohere": "<|END_RESPONSE|><|END|>",
        "gemma": "<end_of_turn>",
        "harmony": "<|return|>" if last else "<|end|>",
        "llama3": "<|eot_id|>",
        "mistral": "</s>",
        "alpaca": "</s>",
        "deepseek": "<｜end▁of▁sentence｜>",
    }.get(name, "<|im_end|>")
    start = {"mistral": " ", "harmony": "<|channel|>final<|message|>"}.get(name, "")
    if name == "qwen3" and last:
        start, text = "<think>\n\n</think>\n\n", text.lstrip("\n")
    return start + text + end
