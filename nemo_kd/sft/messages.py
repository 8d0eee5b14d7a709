"""Conversations of SFT rows in OpenAI's shape, whatever shape the row has.

`messages` is OpenAI's: role, content, tool_calls; `system` may be beside it, as in Anthropic's.
`conversations` is NeMo's, with system and mask beside it, or ShareGPT's. Chat templates get the
content as text, the arguments of tool calls as objects, no null values, and all other keys as in
the row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_kd.json_rows import parsed
from nemo_kd.sft.hashed import RowError

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}
"""Role of each name of a speaker in `conversations`, in lower case."""

SPELLINGS = {**ROLES, "developer": "developer"}
"""How `messages` spell the role of a name in lower case."""
OWN_ROLES = ("observation",)
"""Roles of `messages` that templates know by this name, such as GLM-4's."""

LEARNED = ("train", "training", "trainable", "loss")
"""Keys by which other trainers say what `weight` says, with 1 or 0 or with true or false."""
IN_WORDS = {"false": 0, "no": 0, "true": 1, "yes": 1}
ROW_WIDE = {
    "chat_template_kwargs": "set data.chat_template_kwargs for all rows",
    "documents": "write them into a message",
    "system_prompt": "rename it to `system`",
}
"""Fields of a row that change what is asked, and what to do instead."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys under which messages hold the reasoning before an answer."""

BESIDE_VALUE = ("weight", "tool_calls", "tool_call_id", "name", *LEARNED)
"""Keys of a turn of `conversations` that mean the same as in a message."""

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages and tools as chat templates read them."""

    messages: list[Message]
    tools: list[Any] | None
    weights: list[int | None]
    """The `weight` of each message: 0 or 1, or None if it has none."""

    def part(self, keep: list[int]) -> Conversation:
        """Return the conversation of the messages with these indices."""
        messages, weights = [self.messages[i] for i in keep], [self.weights[i] for i in keep]
        return Conversation(messages, self.tools, weights)

    def assistant_turns(self) -> list[int]:
        return [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]


def is_empty(message: Message) -> bool:
    """Whether a message has no words, reasoning or tool calls."""
    texts = [message["content"], *(str(message.get(key) or "") for key in REASONING)]
    return not any(text.strip() for text in texts) and not message.get("tool_calls")


def conversation_of(row: Any, key: str | None = None) -> Conversation:
    """Read the conversation of a row: that of `key` (`messages` or `conversations`) if it is given.

    Otherwise `messages` comes first. Raises RowError, naming the message but neither file nor row.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"a JSON {type(row).__name__}: expected an object with messages")
    check_row(row)
    if row.get("functions"):
        raise RowError("functions are an old form of tools; write tools and tool_calls")
    keys = ("messages", "conversations") if key is None else (key,)
    found = next((each for each in keys if row.get(each) is not None), None)
    if found is None:
        meant = f", which data.format={key} reads" if key else ""
        raise RowError(f"no {' or '.join(keys)}{meant}; the row has {sorted(map(str, row))}")
    turns = _list(row[found], found) if found == "messages" else _turns(row)
    if not turns:
        raise RowError("the conversation is empty; remove the row")
    turns = _with_system(turns, row.get("system"))
    messages = [_message(turn, i) for i, turn in enumerate(turns)]
    weights = [weight_of(message, f"message {i}") for i, message in enumerate(messages)]
    for message in messages:
        message.pop("weight", None)
    return Conversation(messages, tools_of(row.get("tools")), weights)


def check_row(row: Mapping[str, Any]) -> None:
    """Raise RowError for a field beside the conversation that changes what is asked or learned."""
    for name, instead in ROW_WIDE.items():
        if row.get(name) and row[name] not in _said(row):
            raise RowError(
                f"{name} is {row[name]!r:.60}: it is not read of a row; {instead}, or remove it"
            )
    for name in ("weight", *LEARNED):
        if is_weight(name, row.get(name)):
            raise RowError(
                f"the row has {name} {row[name]!r}: rows are not weighted; remove the row, or its "
                f"{name}"
            )


def is_weight(name: str, value: Any) -> bool:
    """Whether a row's field says that the row is not learned, or counts for another part than 1.

    Other values, such as a loss that somebody has measured, only describe a row.
    """
    number = _number(value)
    return number is not None and number != 1 and (name == "weight" or number == 0)


def _number(value: Any) -> float | None:
    """Return a weight, also where a file's columns have become texts; None for anything else."""
    if isinstance(value, str):
        value = IN_WORDS.get(value.strip().lower(), value)
        try:
            return float(value)
        except ValueError:
            return None
    return float(value) if isinstance(value, int | float) else None


def _with_system(turns: list[Any], system: Any) -> list[Any]:
    """Put a row's `system` before its messages, unless they begin with the same text."""
    if system is not None and not isinstance(system, str):
        raise RowError(f"system is {system!r:.60}: expected a string")
    if not system:
        return turns
    first = turns[0] if isinstance(turns[0], Mapping) else {}
    if first.get("role") not in ("system", "developer"):
        return [{"role": "system", "content": system}, *turns]
    if _content(dict(first), "message 0") != system:
        raise RowError(
            f"system is {system!r:.60}, but message 0 ({first['role']}) is "
            f"{first.get('content')!r:.60}; remove one of them"
        )
    return turns


def _message(turn: Any, number: int) -> Message:
    where = f"message {number}"
    if not isinstance(turn, Mapping):
        raise RowError(f"{where} is {turn!r:.60}: expected an object")
    message = {key: value for key, value in turn.items() if value is not None}
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise RowError(f"{where} has role {role!r}: expected system, user, assistant or tool")
    spelling = SPELLINGS.get(role.lower(), role)
    if role not in (spelling, *OWN_ROLES):
        raise RowError(f"{where} has role {role!r}: write {spelling}")
    if "function_call" in message:
        raise RowError(f"{where}: function_call is an old form; write tool_calls")
    if "tool_calls" in message:
        calls = _list(message["tool_calls"], f"{where}: tool_calls")
        message["tool_calls"] = [_call(call, where) for call in calls]
        if not calls:
            del message["tool_calls"]
    message["content"] = _content(message, where)
    return message


def _content(message: Message, where: str) -> str:
    """Return the text of a message; empty if it has tool calls or reasoning only."""
    content = message.get("content")
    if content is None:
        if "tool_calls" in message or any(message.get(key) for key in REASONING):
            return ""
        raise RowError(f"{where} ({message['role']}) has no content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError(f"{where}: content is {content!r:.60}: expected text or a list of parts")
    return "".join(_part(part, where) for part in content)


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    text = part.get("text") if isinstance(part, Mapping) else None
    if kind != "text" or not isinstance(text, str):
        raise RowError(
            f"{where} has a content part of type {kind!r}: only text can be learned from; remove "
            "the row"
        )
    return text


def _call(call: Any, where: str) -> dict[str, Any]:
    """Return a tool call with its arguments as an object, as templates expect them."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError(f"{where}: tool call {call!r:.60} has no function name")
    function = {key: value for key, value in function.items() if value is not None}
    function["arguments"] = _arguments(
        function.get("arguments", {}), f"{where}: {function['name']}"
    )
    if "function" not in call:
        return function
    return {**{k: v for k, v in call.items() if v is not None}, "function": function}


class Arguments(dict[str, Any]):
    """Arguments of a tool call, with their JSON as in the row for templates that write it."""

    text: str
    is_text: bool
    """Whether the row has them as JSON, which transformers' templates would get."""

    def __str__(self) -> str:
        """Return what a template writes that does not convert them."""
        return self.text if self.is_text else super().__str__()


def _arguments(arguments: Any, where: str) -> Arguments:
    value = arguments
    if isinstance(arguments, str):
        try:
            value = parsed(arguments)
        except (ValueError, RecursionError) as error:
            raise RowError(f"{where}: arguments are not JSON ({error})") from error
    if not isinstance(value, dict):
        raise RowError(f"{where}: arguments are {arguments!r:.60}: expected a JSON object")
    made = Arguments(value)
    made.is_text = isinstance(arguments, str)
    made.text = arguments if made.is_text else json.dumps(value, ensure_ascii=False)
    return made


def tools_of(tools: Any) -> list[Any] | None:
    """Return the list of tools that a row's `tools` are, also in JSON; None if there are none."""
    if isinstance(tools, str):
        try:
            tools = parsed(tools) if tools.strip() else None
        except (ValueError, RecursionError) as error:
            raise RowError(f"tools are not JSON ({error})") from error
    tools = [] if tools is None else _list(tools, "tools")
    for tool in tools:
        if not isinstance(tool, dict):
            raise RowError(f"tools: {tool!r:.60}: expected an object")
    return tools or None


def _said(row: Mapping[str, Any]) -> list[Any]:
    """Return the contents of a row's messages."""
    turns = row.get("messages") or row.get("conversations")
    known = turns if isinstance(turns, list) else []
    return [turn.get("content", turn.get("value")) for turn in known if isinstance(turn, Mapping)]


def weight_of(message: Mapping[str, Any], where: str) -> int | None:
    """Return whether a message is learned, 1 or 0, by its `weight` or another trainer's key.

    None if it does not say. Raises RowError for another weight, and for keys that disagree.
    """
    weight = message.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise RowError(f"{where}: weight is {weight!r:.60}: expected 0 or 1")
    said = {}
    for key in LEARNED:
        number = _number(message.get(key))
        if number in (0, 1) and isinstance(message[key], str):
            raise RowError(f"{where}: {key} is the text {message[key]!r}: write true or false")
        if number in (0, 1):
            said[key] = int(number)
    if weight is not None:
        said["weight"] = int(weight)
    if len({*said.values()}) > 1:
        raise RowError(f"{where}: {said} disagree; remove all but one")
    return next(iter(said.values()), None)


def _turns(row: Mapping[str, Any]) -> list[Message]:
    """Return the messages of NeMo's and ShareGPT's `conversations`."""
    if row.get("type") is not None:
        raise RowError(
            f"type {row['type']!r:.60} (labels) is known to data.chat_template=nemo only"
        )
    mask = row.get("mask")
    if mask is not None and _role(mask, "mask") != "user":
        raise RowError(f"mask {mask!r:.60}: a chat template learns what the assistant says")
    turns = _list(row["conversations"], "conversations")
    return [_turn(turn, f"message {i}") for i, turn in enumerate(turns)]


def _turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
        raise RowError(f"{where} is {turn!r:.60}: expected an object with from and value")
    more = {key: turn[key] for key in (*BESIDE_VALUE, *REASONING) if key in turn}
    return {"role": _role(turn.get("from"), where), "content": turn["value"], **more}


def _role(name: Any, where: str) -> str:
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise RowError(f"{where}: {name!r:.60} is no known speaker: expected one of {[*ROLES]}")
    return role


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise RowError(f"{what}: {value!r:.60}: expected a list")
    return value
