"""Where the assistant's turns are in a long conversation.

To render a conversation up to each of its turns takes a time that grows with the square of their
number. Here one rendering has a mark in the stead of every turn, headers and ends are those of
short renderings, and both are checked against the text. What does not agree is searched for turn by
turn.
"""

from __future__ import annotations

import re
from typing import Any

from nemo_kd.sft.hashed import RowError
from nemo_kd.sft.messages import Conversation
from nemo_kd.sft.spans import Span
from nemo_kd.sft.turns import (
    LEFT_OUT,
    MARKS,
    Turn,
    Turns,
    check_says,
    marked_message,
    named_calls,
    only_calls,
    reasoning,
)

MANY = 1
CLOSE = "\U0010dcba"
"""A mark is a number between this character, for private use, and one that is not in the text."""


def find_turns(
    turns: Turns, conversation: Conversation, text: str, numbers: list[int], many: int = MANY
) -> list[Span]:
    """Return the span in `text`, the rendered conversation, of each message in `numbers`.

    More than `many` are searched for together first. Raises RowError if a turn cannot be found, if
    its span lacks what the assistant says, or if spans overlap.
    """
    spans = _find(turns, conversation, text, numbers, many)
    _check_calls(turns, conversation, text, numbers)
    for (_, stop), (start, _), number in zip(spans, spans[1:], numbers[1:], strict=False):
        if start < stop:
            raise Turn(turns, conversation, text, number).unclear("it overlaps with an earlier one")
    return spans


def _check_calls(turns: Turns, conversation: Conversation, text: str, numbers: list[int]) -> None:
    """Raise RowError if the template leaves out tool calls, found by marks for their names."""
    messages = [*conversation.messages]
    callers = [number for number in numbers if "tool_calls" in messages[number]]
    mark = next((mark for mark in MARKS if mark not in text), "")
    if not callers or not mark:
        return
    for number in callers:
        messages[number] = named_calls(messages[number], mark)
    count = sum(len(messages[number]["tool_calls"]) for number in callers)
    try:
        marked = turns.render(messages, conversation.tools)
    except RowError:  # a template that knows the names of tools
        return
    if marked.count(mark) < count:
        raise RowError(f"message {callers[0]} or a later one: tool calls: {LEFT_OUT}")


def _find(
    turns: Turns, conversation: Conversation, text: str, numbers: list[int], many: int
) -> list[Span]:
    if len(numbers) > many:
        spans = _together(turns, conversation, text, numbers)
        return turns.spans(conversation, text, numbers) if spans is None else spans
    try:
        return turns.spans(conversation, text, numbers)
    except RowError:
        spans = _together(turns, conversation, text, numbers)
        if spans is None:
            raise
        return spans


def _together(
    turns: Turns, conversation: Conversation, text: str, numbers: list[int]
) -> list[Span] | None:
    """Return the spans of turns; None if they cannot be found together."""
    try:
        spans = list(_Together(turns, conversation, text, numbers).spans())
    except RowError:
        return None
    for number, span in zip(numbers, spans, strict=True):
        check_says(conversation.messages[number], text[slice(*span)], number)
    return spans


class _Together:
    """Turns of one conversation; methods raise RowError where renderings do not agree."""

    def __init__(
        self, turns: Turns, conversation: Conversation, text: str, numbers: list[int]
    ) -> None:
        self.turns, self.text, self.numbers = turns, text, numbers
        self.messages, self.tools = conversation.messages, conversation.tools
        unused = [mark for mark in MARKS if mark not in text]
        if not unused:
            raise RowError("its text holds too many private-use characters")
        self.mark = unused[0]
        self.each = [Turn(turns, conversation, text, number) for number in numbers]
        self.headers: dict[str, str] = {}
        self.gaps: dict[tuple[Any, ...], str] = {}
        self.ends: dict[tuple[str, bool], str] = {}

    def spans(self) -> list[Span]:
        said, pieces = self._pieces()
        place, spans = len(pieces[0]), []
        for turn, words, before, after in zip(self.each, said, pieces, pieces[1:], strict=False):
            text = self._words(turn, words, after, place)
            start = place - len(before) + self._start(turn, before, place)
            self._check_own(turn, self.text[start:place])
            place += len(text)
            stop = place + len(turn.end(after, self._end(turn)))
            spans.append((start, self.turns.without_space(self.text, start, stop)))
            place += len(after)
        if place != len(self.text):
            raise RowError("the last turn is unlike the others")
        return spans

    def _pieces(self) -> tuple[list[str], list[str]]:
        """Return what the turns say, and the text before, between and after them."""
        messages, said = [*self.messages], []
        for number in self.numbers:
            messages[number], words = marked_message(
                messages[number], f"{self.mark}{number}{CLOSE}"
            )
            said.append(words)
        parts = re.split(f"{self.mark}([0-9]+){CLOSE}", self.turns.render(messages, self.tools))
        pieces = parts[::2]
        length = sum(map(len, pieces))
        if parts[1::2] != [*map(str, self.numbers)] or not self.text.startswith(pieces[0]):
            raise RowError(f"marks of {len(self.numbers)} turns in {length} characters")
        return said, pieces

    def _words(self, turn: Turn, said: str, after: str, place: int) -> str:
        """Return the turn's words as rendered: a template may take off space around them."""
        for words in (said, said.strip(), said.lstrip("\n"), said.lstrip(), said.rstrip()):
            if self.text.startswith(words + after, place):
                return words
        raise turn.unclear("the template renders its text differently")

    def _check_own(self, turn: Turn, generated: str) -> None:
        """Raise RowError if the words of another message may stand before the turn's words."""
        since = max((number for number in self.numbers if number < turn.number), default=-1)
        for message in self.messages[since + 1 : turn.number]:
            words = message["content"].strip()
            if words and words in generated:
                raise turn.unclear(f"{words!r:.60} stands before it")

    def _start(self, turn: Turn, before: str, place: int) -> int:
        role = turn.before[-1]["role"] if turn.before else ""
        if role not in self.headers:
            self.headers[role] = turn.header()
        if self.headers[role]:
            return self._after_header(turn, before, self.headers[role], place)
        kind = role, only_calls(turn.message), *reasoning(turn.message)
        if kind not in self.gaps:
            self.gaps[kind] = self.text[turn.span()[0] : place]
        if not before.endswith(self.gaps[kind]):
            raise turn.unclear("its header is unlike an earlier one")
        return len(before) - len(self.gaps[kind])

    def _after_header(self, turn: Turn, before: str, header: str, place: int) -> int:
        try:
            return turn.after_header(before, header)
        except RowError:
            return len(before) - (place - turn.span()[0])

    def _end(self, turn: Turn) -> str:
        """Return what follows the turn's words if it ends a short conversation."""
        calls = str(turn.message.get("tool_calls", "")), only_calls(turn.message)
        if calls not in self.ends:
            marked, _ = marked_message(turn.message, self.mark)
            first = self.messages[: self.numbers[0]]
            self.ends[calls] = turn.around(self.mark, [*first, marked])[1]
        return self.ends[calls]
