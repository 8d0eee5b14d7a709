"""Where the assistant's turns are in a rendered conversation.

A turn begins where the template's generation prompt ends, and ends with its end-of-turn token. Both
are found by comparing renderings: of the messages before the turn with the generation prompt, and
of the messages up to the turn. Where these are no prefixes of the conversation (a template that
drops earlier reasoning, or looks at the messages that follow), the turn's text is replaced by a
mark, and what stands before and after the mark is compared.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from nemo_kd.sft.chat_template import Renderer
from nemo_kd.sft.hashed import RowError
from nemo_kd.sft.messages import REASONING, Conversation, Message
from nemo_kd.sft.spans import Span

MARKS = [chr(0x10F000 + i) for i in range(64)]
"""Characters for private use, which stand for the words of a message."""
REASONING_TAG, END_OF_REASONING = "<think>", "</think>"
LEFT_OUT = (
    "the chat template leaves out or changes what the assistant says; set the message's weight to "
    "0, remove the row, or set data.chat_template=FILE"
)


@dataclass
class Turns:
    """The spans of assistant turns in the renderings of a template.

    `added` are the tokenizer's special and added tokens.
    """

    render: Renderer
    added: tuple[str, ...]
    _headers: dict[str, bool] = field(default_factory=dict)
    _tails: dict[str, str] = field(default_factory=dict)

    def spans(self, conversation: Conversation, text: str, turns: Iterable[int]) -> list[Span]:
        """Return the span in `text`, the rendered conversation, of each message in `turns`.

        Raises RowError if a turn cannot be found, or if its span lacks what the assistant says.
        """
        return [Turn(self, conversation, text, i).span() for i in turns]

    def has_prompt(self, before: Sequence[Message], tools: list[Any] | None, prompt: str) -> bool:
        """Whether the template adds a generation prompt after a message of the last one's role."""
        role = before[-1]["role"] if before else ""
        if role not in self._headers:
            self._headers[role] = self.render(before, tools) != prompt
        return self._headers[role]

    def tail(self, tools: list[Any] | None) -> str:
        """Return what the template writes after every last message, as no part of it.

        The text after a last answer is compared with that after an answer and before a question.
        What both begin with, up to a token that opens messages, is the end of the turn.
        """
        key = self.render.text(tools)
        if key not in self._tails:
            try:
                self._tails[key] = self._find_tail(tools)
            except RowError:
                self._tails[key] = ""  # a template that refuses such conversations
        return self._tails[key]

    def _find_tail(self, tools: list[Any] | None) -> str:
        words, question = MARKS[:2]
        asks = {"role": "user", "content": question}
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": words}]
        end = self.render(turns, tools).partition(words)[2]
        between = self.render([*turns, asks], tools).partition(words)[2].partition(question)[0]
        whole = self.whole_tokens(_common(between, end))
        if between.startswith(end) or not whole:
            return ""
        first = self.render([asks], tools).partition(question)[0]
        opening = self._added.search(
            first.removeprefix(str(self.render.variables.get("bos_token")))
        )
        if opening and opening.group() in whole:
            whole = whole[: whole.rindex(opening.group())]
        return end[len(whole) :]

    def without_space(self, text: str, start: int, stop: int) -> int:
        """Return the end of a turn: whitespace after an end-of-turn token is not part of it."""
        turn = text[start:stop].rstrip()
        return start + len(turn) if turn.endswith(self.added) else stop

    def whole_tokens(self, text: str) -> str:
        """Return a text up to its last added token; empty if it has none."""
        return text[: max((found.end() for found in self._added.finditer(text)), default=0)]

    def without_tokens(self, text: str) -> str:
        """Return a text without added tokens."""
        return self._added.sub("", text)

    def first_token(self, text: str) -> str:
        """Return a text up to its first added token; all of it if it has none."""
        found = self._added.search(text)
        return text[: found.end()] if found else text

    def end_token(self, text: str) -> str:
        """Return the added token at the start of a text if another one follows it.

        The first of two ends a turn; a single one begins the next.
        """
        found = self._added.match(text)
        follows = found and self._added.match(text[found.end() :].lstrip())
        return found.group() if found and follows else ""

    def difference(self, text: str, other: str) -> int:
        """Return where a text begins to differ from another one, in whole tokens."""
        place = len(_common(text, other))
        spans = [found.span() for each in (text, other) for found in self._added.finditer(each)]
        return min([start for start, stop in spans if start < place < stop], default=place)

    @cached_property
    def _added(self) -> re.Pattern[str]:
        longest_first = sorted(self.added, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


@dataclass
class Turn:
    """One assistant turn: message `number` of a conversation rendered as `text`."""

    turns: Turns
    conversation: Conversation
    text: str
    number: int

    def __post_init__(self) -> None:
        self.messages, self.tools = self.conversation.messages, self.conversation.tools
        self.message, self.before = self.messages[self.number], self.messages[: self.number]
        self.later = self.messages[self.number + 1 :]

    def span(self) -> Span:
        start, stop = self._by_prefixes() or self._by_mark()
        stop = self.turns.without_space(self.text, start, stop)
        check_says(self.message, self.text[start:stop], self.number)
        return start, stop

    def _by_prefixes(self) -> Span | None:
        prompt = self._rendered(self.before, prompt=True)
        until: str | None = self.text
        if self.later:
            until = self._rendered(self.messages[: self.number + 1])
        if prompt is None or until is None:
            return None
        if not (self.text.startswith(until) and until.startswith(prompt)):
            return None
        start = len(prompt)
        if not self.turns.has_prompt(self.before, self.tools, prompt):
            start += len(self._own_header(prompt, self.text[start:]))
        return start, len(self._without_tail(until))

    def _without_tail(self, text: str) -> str:
        return text.removesuffix(self.turns.tail(self.tools))

    def _by_mark(self) -> Span:
        """Find the turn by a mark in its stead, in the conversation and in its beginning."""
        mark, _ = self._marks
        marked, said = marked_message(self.message, mark)
        before, after = self.around(mark, [*self.before, marked, *self.later])
        _, end = self.around(mark, [*self.before, marked])
        text = self.text[len(before) : len(self.text) - len(after)]
        same = before + text + after == self.text and text.strip() == said.strip()
        if not same:
            raise self.unclear("the template renders other messages differently with this turn")
        return self._start(before), len(before) + len(text) + len(self.end(after, end))

    @property
    def _marks(self) -> tuple[str, str]:
        """Two characters that are not in the conversation."""
        unused = [mark for mark in MARKS if mark not in self.text]
        if len(unused) < 2:
            raise self.unclear("its text holds too many private-use characters")
        return unused[0], unused[1]

    def _start(self, before: str) -> int:
        """Return where the turn begins in `before`, the text before its mark."""
        header, near = self.header(), self._near(before)
        if header:
            return len(before) - len(near) + self.after_header(near, header)
        return self._after_previous(before)

    def _near(self, before: str) -> str:
        """Return the part of `before` that follows the words of the message before."""
        if not self.before:
            return before
        mark, other = self._marks
        previous = [*self.before[:-1], marked_message(self.before[-1], other)[0]]
        own = marked_message(self.message, mark)[0]
        _, rest = self.around(other, [*previous, own, *self.later])
        near = rest.partition(mark)[0]
        if not before.endswith(near):
            raise self.unclear("the template changes it with the message before")
        return near

    def header(self) -> str:
        """Return the generation prompt after the messages before; empty if there is none."""
        context = self.before
        prompt = self._rendered(context, prompt=True)
        if prompt is None:  # some templates render no empty conversation
            context = [{"role": "user", "content": ""}]
            prompt = self._rendered(context, prompt=True)
        bare = self._rendered(context)
        if prompt is None or bare is None:
            raise self.unclear("the template refuses the messages before it")
        header = prompt[self.turns.difference(prompt, bare) :]
        return header if header.strip() else ""

    def _after_previous(self, before: str) -> int:
        """Return where the turn begins if the template has no generation prompt.

        That is after the end of the message before, which is found by a mark in its stead, and
        after a header unless it is whitespace.
        """
        if not self.before:
            return len(before)
        mark, other = self._marks
        previous = [*self.before[:-1], marked_message(self.before[-1], other)[0]]
        plain, own = {"role": "assistant", "content": mark}, marked_message(self.message, mark)[0]
        _, end = self.around(other, previous)
        _, as_last = self.around(other, [*previous, plain])
        _, as_is = self.around(other, [*previous, own, *self.later])
        as_last, as_is = as_last.partition(mark)[0], as_is.partition(mark)[0]
        if not (as_last.startswith(end) and as_is.startswith(end)):
            raise self.unclear("its header depends on the messages that follow")
        header = as_is[len(end) : self.turns.difference(as_is, as_last)]
        return len(before) - len(as_is) + len(end) + len(header) * bool(header.strip())

    def after_header(self, before: str, header: str) -> int:
        """Return the end of the last header in `before`.

        The generation prompt may open or skip the reasoning, as the turn's header need not.
        """
        first = self.turns.first_token(header)
        thoughts = [text.strip() for text in reasoning(self.message) if text.strip()]
        place = -1 if any(first in text for text in thoughts) else before.rfind(first)
        _, earlier, between = before[: max(place, 0)].rpartition(header)
        if earlier and any(text in between for text in thoughts):
            raise self.unclear("a header stands between its reasoning and its text")
        found, plain = before[max(place, 0) :], header.partition(REASONING_TAG)[0]
        if place >= 0 and header.startswith(found):
            return len(before)
        for start in (header, plain):
            if place >= 0 and found.startswith(start):
                return place + len(start)
        raise self.unclear(f"the generation prompt {header!r:.60} does not precede it")

    def end(self, after: str, end: str) -> str:
        """Return the part of `after`, the text after the turn's mark, that belongs to the turn.

        `end` is that text if the conversation ended with the turn.
        """
        end = self._without_tail(end)
        if after.startswith(end):
            return end
        common = _common(after, end)
        whole = self.turns.whole_tokens(common) or self.turns.end_token(after)
        if not whole and common.strip():
            raise self.unclear(f"{end!r:.60} does not follow it")
        return whole

    def _own_header(self, prompt: str, rest: str) -> str:
        """Return the header that a template without generation prompt writes before an answer."""
        mark, _ = self._marks
        with_mark = self._rendered([*self.before, {"role": "assistant", "content": mark}])
        plain = (with_mark or "").partition(mark)[0]
        plain = plain[len(prompt) :] if plain.startswith(prompt) else ""
        header = rest[: self.turns.difference(rest, plain)]
        return header if header.strip() else ""

    def around(self, mark: str, messages: list[Message]) -> tuple[str, str]:
        parts = self.turns.render(messages, self.tools).split(mark)
        if len(parts) == 1:
            raise RowError(f"message {self.number}: {LEFT_OUT}")
        if len(parts) != 2:
            raise self.unclear(f"the template renders its text {len(parts) - 1} times")
        return parts[0], parts[1]

    def _rendered(self, messages: Sequence[Message], *, prompt: bool = False) -> str | None:
        """Render messages; None if the template refuses them without the others."""
        try:
            return self.turns.render(messages, self.tools, prompt=prompt)
        except RowError:
            return None

    def unclear(self, why: str) -> RowError:
        return RowError(
            f"message {self.number}: its place in the rendered conversation is not clear: {why}; "
            "mark the assistant's text with {% generation %} in a template of your own "
            "(data.chat_template=FILE), or remove the row"
        )


def check_says(message: Message, turn: str, number: int) -> None:
    """Raise RowError unless a turn's text has the message's content and calls.

    Space around the content may differ, and reasoning inside it may be left out.
    """
    content = message["content"].strip()
    answer = content.rpartition(END_OF_REASONING)[2].strip()
    missing = [] if content in turn or answer in turn else [answer]
    missing += _missing_calls(message, content if content in turn else answer, turn)
    if missing:
        raise RowError(f"message {number}: {missing[0]!r:.60} is not in {turn!r:.60}: {LEFT_OUT}")


def _missing_calls(message: Message, content: str, turn: str) -> list[str]:
    """Return names and arguments of tool calls that a turn lacks beside the message's words."""
    calls = [call.get("function", call) for call in message.get("tool_calls", ())]
    if not calls:
        return []
    own = [text for text in (content, *reasoning(message)) if text and text in turn]
    missing = []
    for name, count in Counter(call["name"] for call in calls).items():
        elsewhere = sum(text.count(name) for text in own)
        missing += [name] * (turn.count(name) - elsewhere < count)
    values = [value for call in calls for value in _values(call["arguments"])]
    return missing + [value for value in values if not is_in(value, turn)]


def _values(arguments: Any) -> Iterator[str]:
    """Yield the keys, texts and numbers of a call's arguments."""
    if isinstance(arguments, dict):
        yield from arguments
        yield from (text for value in arguments.values() for text in _values(value))
    elif isinstance(arguments, list):
        yield from (text for value in arguments for text in _values(value))
    elif isinstance(arguments, str) or (arguments and not isinstance(arguments, bool)):
        yield str(arguments)


def is_in(value: str, turn: str) -> bool:
    """Return whether a value is in a text, as it is or in JSON or Python."""
    forms = (value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1])
    return any(form in turn for form in (*forms, repr(value)[1:-1]))


def only_calls(message: Message) -> bool:
    """Whether a message has tool calls and no words beside them but reasoning."""
    answer = message["content"].rpartition(END_OF_REASONING)[2]
    return bool(message.get("tool_calls")) and not answer.strip()


def named_calls(message: Message, name: str) -> Message:
    """Return a message whose tool calls all have another name."""

    def named(call: Message) -> Message:
        if "function" in call:
            return {**call, "function": named(call["function"])}
        return {**call, "name": name}

    return {**message, "tool_calls": [named(call) for call in message["tool_calls"]]}


def marked_message(message: Message, mark: str) -> tuple[Message, str]:
    """Return a message with a mark instead of what it says, and the text so replaced.

    That is the content after the reasoning, or, if there is none, the name of the first call.
    """
    if not only_calls(message):
        head, end, answer = message["content"].rpartition(END_OF_REASONING)
        return {**message, "content": head + end + mark}, answer
    call, *more = message["tool_calls"]
    function = call.get("function", call)
    named = {**function, "name": mark}
    marked = {**call, "function": named} if "function" in call else named
    return {**message, "tool_calls": [marked, *more]}, function["name"]


def reasoning(message: Message) -> list[str]:
    """Return the texts of a message that precede what it says."""
    texts = [message["content"].rpartition(END_OF_REASONING)[0], *map(message.get, REASONING)]
    return [text for text in texts if isinstance(text, str)]


def _common(one: str, other: str) -> str:
    """Return the longest common prefix."""
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))]
