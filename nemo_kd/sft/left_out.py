"""Messages and tools that a chat template leaves out, though a conversation has them.

Each message that is not the assistant's gets a mark of its own inside its text, and each tool a
mark as its name; a mark that the template does not write stands for what it leaves out. The words
themselves would not do: the `2` of a tool may also be in the answer.
"""

from __future__ import annotations

import re
from typing import Any

from nemo_kd.sft.chat_template import Renderer
from nemo_kd.sft.hashed import RowError
from nemo_kd.sft.messages import Conversation, Message
from nemo_kd.sft.turns import MARKS, is_in

HOW = "remove {}, or set data.chat_template=FILE to a template that reads {}"


def check_context(render: Renderer, conversation: Conversation, text: str) -> None:
    """Raise RowError if the template leaves out tools, or a message that is not the assistant's.

    `text` is the rendered conversation. What an assistant says is checked with its turn.
    """
    unused = [mark for mark in MARKS if mark not in text][:2]
    if len(unused) == 2:
        _check_messages(render, conversation, *unused)
        _check_tools(render, conversation, unused[0])


def _check_messages(render: Renderer, conversation: Conversation, start: str, stop: str) -> None:
    messages, marks = [*conversation.messages], dict[int, str]()
    for i, message in enumerate(messages):
        if message["role"] != "assistant" and message["content"].strip():
            marks[i] = f"{start}{i}{stop}"
            messages[i] = _with_mark(message, marks[i])
    marked = _rendered(render, messages, conversation.tools) if marks else None
    if marked is None:
        return
    seen = set(re.findall(f"{start}[0-9]+{stop}", marked))  # one search, however many messages
    for i, mark in marks.items():
        if mark not in seen and not is_in(mark, marked):
            raise RowError(
                f"message {i} ({messages[i]['role']}): the chat template leaves it out; "
                f"{HOW.format('it', 'it')}"
            )


def _with_mark(message: Message, mark: str) -> Message:
    """Return a message with a mark in the middle: templates look at the ends of a text."""
    words = message["content"].strip()
    middle = len(words) // 2
    return {**message, "content": words[:middle] + mark + words[middle:]}


def _check_tools(render: Renderer, conversation: Conversation, mark: str) -> None:
    tools = conversation.tools or render.tools or []
    named = [_named(tool, mark) for tool in tools]
    if not tools or named == tools:
        return
    marked = _rendered(render, conversation.messages, named)
    if marked is not None and not is_in(mark, marked):
        where = "the row's tools" if conversation.tools else "data.chat_template_kwargs.tools"
        raise RowError(f"the chat template leaves out {where}; {HOW.format('them', 'them')}")


def _named(tool: Any, name: str) -> Any:
    """Return a tool with another name; a tool without a name as it is."""
    if not isinstance(tool, dict):
        return tool
    if "function" in tool:
        return {**tool, "function": _named(tool["function"], name)}
    return {**tool, "name": name} if "name" in tool else tool


def _rendered(render: Renderer, messages: list[Message], tools: list[Any] | None) -> str | None:
    try:
        return render(messages, tools)
    except RowError:  # a template that knows the words or the names of tools
        return None
