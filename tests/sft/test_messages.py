"""Rows as conversations: OpenAI's messages, NeMo's and ShareGPT's conversations."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_kd.sft import RowError
from nemo_kd.sft.messages import conversation_of


def call(arguments: Any, **more: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments, **more}
    return {"id": "c1", "type": "function", "function": function}


ARGUMENTS = '{"x": [1, null]}'


def part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def test_messages_keep_what_templates_may_read() -> None:
    row = {
        "messages": [
            {"role": "system", "content": ""},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b\n"}],
            },
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [call('{"x": [1, null]}', strict=None)],
            },
            {"role": "tool", "content": " 2", "tool_call_id": "c1", "name": "f"},
            {
                "role": "assistant",
                "content": "c",
                "tool_calls": [],
                "thinking": "r",
                "weight": 0,
            },
            {"role": "user", "content": "d", "name": None, "weight": None},
        ],
        "tools": '[{"type": "function"}]',
    }
    found = conversation_of(row)
    assert found.messages == [
        {"role": "system", "content": ""},
        {"role": "user", "content": "ab\n"},
        {"role": "assistant", "content": "", "tool_calls": [call({"x": [1, None]})]},
        {"role": "tool", "content": " 2", "tool_call_id": "c1", "name": "f"},
        {"role": "assistant", "content": "c", "thinking": "r"},
        {"role": "user", "content": "d"},
    ]
    assert found.tools == [{"type": "function"}]
    assert found.weights == [None, None, None, None, 0, None]
    assert found.assistant_turns() == [2, 4]


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_no_tools(tools: Any) -> None:
    row = {"messages": [{"role": "user", "content": "a"}], "tools": tools}
    assert conversation_of(row).tools is None


def test_nemos_conversations() -> None:
    """An empty system text is no system message: NeMo's rows must have the key."""
    turns = [{"from": "User", "value": "a"}, {"from": "Assistant", "value": " b", "weight": 1}]
    row = {"system": "s", "mask": "User", "type": None, "conversations": turns}
    assert conversation_of(row).messages == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": " b"},
    ]
    assert conversation_of(row).weights == [None, None, 1]
    assert len(conversation_of({**row, "system": ""}).messages) == 2


def test_sharegpts_conversations() -> None:
    names = {"system": "system", "human": "user", "gpt": "assistant", "tool": "tool"}
    row = {"conversations": [{"from": name, "value": name} for name in names]}
    assert conversation_of(row).messages == [
        {"role": role, "content": name} for name, role in names.items()
    ]


def test_tool_calls_of_conversations_are_those_of_messages() -> None:
    """Other trainers' rows have them beside `value`."""
    use = {"tool_calls": [call('{"x": 1}')]}
    answer = {"tool_call_id": "c1", "name": "f"}
    asked = {"from": "gpt", "value": "I look.", **use}
    row = {"conversations": [HUMAN, asked, {"from": "tool", "value": "2", **answer}]}
    same = [
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "I look.", **use},
        {"role": "tool", "content": "2", **answer},
    ]
    found, of_messages = conversation_of(row), conversation_of({"messages": same})
    assert found == of_messages
    assert found.messages[1]["tool_calls"] and found.messages[2]["tool_call_id"] == "c1"


@pytest.mark.parametrize("key", ["train", "training", "trainable", "loss"])
def test_other_trainers_keys_mean_weight(key: str) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", key: False}]
    assert conversation_of({"messages": turns}).weights == [None, 0]
    turns = [HUMAN, {"from": "gpt", "value": "a", key: False}, {**HUMAN, key: True}]
    assert conversation_of({"conversations": turns}).weights == [None, 0, 1]
    assert conversation_of(say(content="a", **{key: 0.5})).weights == [None]
    for value, weight in ((0, 0), (1, 1), (0.0, 0), (None, None), ("low", None)):
        assert conversation_of(say(content="a", **{key: value})).weights == [weight]
    for text in ("0", "false", "True"):
        with pytest.raises(RowError, match=f"{key} is the text '{text}': write true or false"):
            conversation_of(say(content="a", **{key: text}))
    for none in (0, False, "false", "0.0"):
        with pytest.raises(RowError, match=f"the row has {key} .*: rows are not weighted"):
            conversation_of({**say(content="a"), key: none})
    for described in (True, 1, 0.5, "high"):
        conversation_of({**say(content="a"), key: described})
    with pytest.raises(RowError, match="disagree"):
        conversation_of(say(content="a", weight=1, **{key: False}))


def test_a_system_prompt_that_the_messages_say_is_not_refused() -> None:
    row = {**say(content="a"), "system_prompt": "x"}
    with pytest.raises(RowError, match="rename it to `system`"):
        conversation_of(row)
    conversation_of({**row, "messages": [SYSTEM, *row["messages"]]})
    conversation_of({"system_prompt": "c", "conversations": [{**HUMAN, "from": "system"}]})
    for name in ("system_prompt", "chat_template_kwargs", "documents", "weight"):
        conversation_of({**say(content="a"), name: None})
    conversation_of({**say(content="a"), "weight": "heavy", "chat_template_kwargs": {}})
    with pytest.raises(RowError, match=r"the row has weight '0\.5'"):
        conversation_of({**say(content="a"), "weight": "0.5"})


def test_a_system_text_beside_messages_comes_first() -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    first = {"role": "system", "content": "You are brief."}
    row = {"system": "You are brief.", "messages": turns}
    assert conversation_of(row).messages == [first, *turns]
    assert conversation_of({**row, "messages": [first, *turns]}).messages == [first, *turns]
    assert conversation_of(row).weights == [None] * 3
    for empty in ("", None):
        assert conversation_of({**row, "system": empty}).messages == turns


@pytest.mark.parametrize("role", ["developer", "tool", "observation", "ipython", "critic"])
def test_roles_that_only_a_template_knows_stay_as_they_are(role: str) -> None:
    assert (
        conversation_of({"messages": [{"role": role, "content": "a"}]}).messages[0]["role"] == role
    )


def test_a_key_that_is_named_is_the_only_one_read() -> None:
    row = {"messages": [{"role": "user", "content": "m"}], "conversations": [HUMAN]}
    read = {key: conversation_of(row, key).messages[0]["content"] for key in row}
    assert read == {"messages": "m", "conversations": "c"}
    assert conversation_of(row).messages[0]["content"] == "m"
    with pytest.raises(RowError, match=r"no messages, which data.format=messages reads; the row"):
        conversation_of({"conversations": [HUMAN]}, "messages")


HUMAN = {"from": "human", "value": "c"}
SYSTEM = {"role": "system", "content": "x"}


def say(**message: Any) -> dict[str, Any]:
    return {"messages": [{"role": "assistant", **message}]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "a JSON list: expected an object"),
        ({"text": "a"}, r"no messages or conversations; the row has \['text'\]"),
        ({"messages": "a"}, "messages: 'a': expected a list"),
        ({"messages": []}, "the conversation is empty"),
        ({"messages": ["a"]}, "message 0 is 'a': expected an object"),
        ({"messages": [{"content": "a"}]}, "message 0 has role None"),
        ({"messages": [{"role": "Assistant", "content": "a"}]}, "role 'Assistant': write assist"),
        ({"messages": [{"role": "model", "content": "a"}]}, "role 'model': write assistant"),
        ({"messages": [{"role": "human", "content": "a"}]}, "0 has role 'human': write user"),
        ({"messages": [{"role": "User", "content": "a"}]}, "role 'User': write user"),
        ({"messages": [{"role": "System", "content": "a"}]}, "role 'System': write system"),
        ({"messages": [{"role": "Developer", "content": "a"}]}, "write developer"),
        ({"messages": [{"role": "TOOL", "content": "a"}]}, "role 'TOOL': write tool"),
        (say(), r"message 0 \(assistant\) has no content"),
        (say(content=3), "content is 3: expected text"),
        (say(content=[{"type": "image_url", "image_url": {}}]), "part of type 'image_url'"),
        (say(content=["a"]), "part of type 'str'"),
        (say(content="a", weight=2), "weight is 2: expected 0 or 1"),
        (say(content="a", weight=True), "weight is True"),
        (say(content="a", weight="1"), "weight is '1'"),
        (say(content=None, function_call={"name": "f"}), "function_call is an old form"),
        (say(content=None, tool_calls="f"), "tool_calls: 'f': expected a list"),
        (say(content=None, tool_calls=[{"id": "c"}]), "has no function name"),
        (say(content=None, tool_calls=[call("{")]), "message 0: f: arguments are not JSON"),
        (say(content=None, tool_calls=[call("[1]")]), "expected a JSON object"),
        ({**say(content="a"), "tools": "{"}, "tools are not JSON"),
        ({**say(content="a"), "tools": ["f"]}, "tools: 'f': expected an object"),
        ({**say(content="a"), "functions": [{}]}, "functions are an old form"),
        ({**say(content="a"), "weight": 0}, "the row has weight 0: rows are not weighted"),
        ({**say(content="a"), "chat_template_kwargs": {"x": 1}}, "data.chat_template_kwargs for"),
        ({**say(content="a"), "documents": ["d"]}, "documents is .*write them into a message"),
        ({"conversations": [{"from": "who", "value": "a"}]}, "'who' is no known speaker"),
        ({"conversations": [{"from": "User"}]}, "expected an object with from and value"),
        ({"mask": "Assistant", "conversations": [{}]}, "mask 'Assistant'"),
        ({"type": "TEXT_TO_VALUE", "conversations": [{}]}, "data.chat_template=nemo only"),
        ({"system": 3, "conversations": [HUMAN]}, "system is 3: expected a string"),
        ({**say(content="a"), "system": ["s"]}, r"system is \['s'\]: expected a string"),
        ({"system": "s", "messages": [SYSTEM]}, r"system is 's', but message 0 \(system\) is 'x'"),
    ],
)
def test_what_is_no_conversation_is_an_error_by_message(row: Any, message: str) -> None:
    with pytest.raises(RowError, match=message):
        conversation_of(row)
