"""NeMo's layout of conversations: the text of `GPTSFTChatDataset`, and which of it is learned.

    <extra_id_0>System\\n{system}\\n<extra_id_1>User\\n{value}\\n<extra_id_1>Assistant\\n{value}\\n<extra_id_1>

Learned are the turns of speakers that the row's `mask` does not name, each with its end of turn and
the mark that begins the next turn. With `type` VALUE_TO_TEXT a label precedes the text, and is not
learned; with TEXT_TO_VALUE it follows, and is learned instead of the text. The first turn is
context only, unless its label is learned. NeMo counts the tokens of each turn alone; here they are
found by their place in the text of the whole conversation.

A conversation that is too long loses its end or, with `truncation_method=left`, its beginning;
with `truncate_at=turn`, whole turns from that side, never the system prompt.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from nemo_kd.sft.hashed import RowError
from nemo_kd.sft.messages import REASONING, ROLES, check_row, tools_of, weight_of
from nemo_kd.sft.rows import NO_ANSWER, Encoded, NoAnswerError
from nemo_kd.sft.spans import Span, encode_spans
from nemo_kd.sft.tokenizer import Tokenizer, decoded

TYPES = (None, "TEXT_TO_VALUE", "VALUE_TO_TEXT")
TO_VALUE, TO_TEXT = TYPES[1:]
NAMES = {"user": "User", "assistant": "Assistant"}
"""NeMo's name of a speaker, by the role of a message."""


NOT_HELD = (
    "NeMo's turns have no place for this; remove it, or use the tokenizer's chat template "
    "(data.chat_template=tokenizer)"
)
NO_TURN_FITS = "data.truncate_at=turn: no learned turn fits into data.max_seq_length"


@dataclass(frozen=True)
class _Talk:
    """A checked row: its system prompt, type, masked speakers and turns."""

    system: str
    kind: str | None
    masked: list[str]
    turns: list[dict[str, Any]]


@dataclass(frozen=True)
class NemoTurns:
    """Encoder of NeMo's conversations."""

    tokenizer: Tokenizer
    turn_tokens: Mapping[str, str]
    """The texts around the turns, with the keys of `sft.config.TURN_TOKENS`."""

    learn_all: bool = False
    """Whether every token is learned."""

    max_seq_length: int | None = None
    """Longer conversations are truncated to this many tokens; None keeps them."""

    truncation_method: str = "right"
    """The end from which tokens or turns are removed: `left` or `right`."""

    truncate_at: str = "token"
    """What is removed of a conversation that is too long: `token`s or whole turns (`turn`)."""

    def __call__(self, row: Any) -> Encoded:
        """Tokenize a conversation; raise RowError if it is none, or if nothing of it is learned."""
        talk = _checked(row)
        encoded = self._encode(talk)
        excess = len(encoded.input_ids) - (self.max_seq_length or len(encoded.input_ids))
        if excess <= 0:
            return encoded
        if self.truncate_at == "turn":
            return self._with_fewer_turns(talk)
        kept = slice(excess, None) if self.truncation_method == "left" else slice(-excess)
        return Encoded(encoded.input_ids[kept], encoded.loss_mask[kept], truncated=True)

    def _encode(self, talk: _Talk) -> Encoded:
        text, spans = self._layout(talk)
        if not spans or not (self.learn_all or _has_words(talk)):
            raise NoAnswerError(NO_ANSWER)
        return encode_spans(self.tokenizer, text, [(0, len(text))] if self.learn_all else spans)

    def _with_fewer_turns(self, talk: _Talk) -> Encoded:
        """Remove as few turns as possible from one end; on the left the rest begins unlearned."""
        count = range(1, len(talk.turns))
        if self.truncation_method == "left":
            starts = [start for start in count if talk.turns[start]["from"] in talk.masked]
            parts = [replace(talk, turns=talk.turns[start:]) for start in starts]
        else:
            parts = [replace(talk, turns=talk.turns[:stop]) for stop in reversed(count)]
        found = bisect_left(parts, True, key=self._fits)
        if found == len(parts):
            raise NoAnswerError(NO_TURN_FITS)
        return self._encode(parts[found])._replace(truncated=True)

    def _fits(self, talk: _Talk) -> bool:
        encoded = encode_spans(self.tokenizer, *self._layout(talk))
        return len(encoded.input_ids) <= (self.max_seq_length or len(encoded.input_ids))

    def alters(self, row: Any) -> bool:
        """Return whether the tokens of a row, decoded, are another text."""
        text, spans = self.layout(row)
        return decoded(self.tokenizer, encode_spans(self.tokenizer, text, spans).input_ids) != text

    def layout(self, row: Any) -> tuple[str, list[Span]]:
        """Return a conversation's text, and the [start, stop) of the characters to learn."""
        return self._layout(_checked(row))

    def _layout(self, talk: _Talk) -> tuple[str, list[Span]]:
        system, kind, masked, turns = talk.system, talk.kind, talk.masked, talk.turns
        at = self.turn_tokens
        text = f"{at['system_turn_start']}System{at['end_of_name']}{system}{at['end_of_turn']}"
        spans: list[Span] = []
        for number, turn in enumerate(turns):
            is_masked = turn["from"] in masked
            start = len(text)
            if is_masked and number > (kind != TO_VALUE):  # it marks the end of the turn before
                spans.append((start, start + len(at["turn_start"])))
            text += f"{at['turn_start']}{turn['from']}{at['end_of_name']}"
            label = _label(turn, kind)
            if kind == TO_TEXT and label is not None:
                text += f"{at['label_start']}{label}{at['end_of_name']}"
            start = len(text)
            text += f"{turn['value']}{at['end_of_turn']}"
            if kind == TO_VALUE and label is not None:
                text += at["label_start"]
                start = len(text)
                text += f"{label}{at['end_of_name']}"
            if not is_masked and (number or kind == TO_VALUE):
                spans.append((start, len(text)))
        if turns[-1]["from"] not in masked:
            spans.append((len(text), len(text) + len(at["turn_start"])))
            text += at["turn_start"]
        return text, list(_joined(spans))


def as_conversation(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """Convert messages of text to NeMo's row; raise RowError for what its layout cannot hold."""
    system, turns = "", []
    for number, message in enumerate(messages):
        role = message["role"]
        if role == "system" and not number:
            system = message["content"]
        elif role in NAMES and not (more := _more(message)):
            turns.append({"from": NAMES[role], "value": message["content"]})
        elif role in NAMES:
            raise RowError(f"message {number} ({role}): {more}: {NOT_HELD}")
        else:
            raise RowError(
                f"message {number} ({role}) does not fit into NeMo's turns, which are those of "
                "user and assistant after one system prompt; use the tokenizer's chat template"
            )
    return {"system": system, "conversations": turns, "mask": "User"}


def check_held(row: Any) -> None:
    """Raise RowError for what a row of `conversations` asks and NeMo's layout cannot hold."""
    if not isinstance(row, Mapping):
        return
    check_row(row)
    if tools_of(row.get("tools")):
        raise RowError(f"the row's tools: {NOT_HELD}")
    turns = row.get("conversations")
    for number, turn in enumerate(turns if isinstance(turns, list) else ()):
        if isinstance(turn, Mapping) and (more := _more(turn)):
            raise RowError(f"turn {number}: {more}: {NOT_HELD}")


def _more(turn: Mapping[str, Any]) -> str:
    """Return what a turn has besides its words, for a message; empty if it has no more."""
    weight = weight_of(turn, "a turn")
    if weight == 0 and ROLES.get(str(turn.get("from", "")).lower()) != "user":
        return "weight 0"
    return next((key for key in ("tool_calls", *REASONING) if turn.get(key)), "")


def _checked(row: Any) -> _Talk:
    """Check the shape of a row; raise RowError for another one."""
    if not isinstance(row, Mapping):
        raise RowError(f"a JSON {type(row).__name__}: expected an object with `conversations`")
    turns, system = row.get("conversations"), row.get("system")
    if not isinstance(turns, list) or not turns:
        raise RowError(
            f"no list of turns in `conversations`; the row has {sorted(row)}. A conversation has "
            "`system`, `mask` and `conversations`; fix or remove the row"
        )
    for number, turn in enumerate(turns):
        texts = [turn.get(key) for key in ("from", "value")] if isinstance(turn, Mapping) else []
        if [type(text) for text in texts] != [str, str]:
            raise RowError(f"turn {number} has no texts `from` and `value`: {turn!r:.60}")
    if system is not None and not isinstance(system, str):
        raise RowError(f"`system` is {system!r:.60}: expected a text")
    kind, mask = row.get("type"), row.get("mask", "User")
    if kind not in TYPES:
        raise RowError(f"`type` is {kind!r:.60}: expected null, TEXT_TO_VALUE or VALUE_TO_TEXT")
    masked = mask.split(",") if isinstance(mask, str) else []
    speakers = {turn["from"] for turn in turns}
    absent = sorted(set(masked) - speakers)
    if absent or not masked:
        raise RowError(
            f"`mask` is {mask!r:.60}, but the speakers are {', '.join(sorted(speakers))}: it names "
            "those whose turns are not learned, separated by commas"
        )
    return _Talk(system or "", kind, masked, turns)


def _has_words(talk: _Talk) -> bool:
    """Whether a learned turn or label is not empty."""
    first = 0 if talk.kind == TO_VALUE else 1  # the first turn's text is context
    for turn in talk.turns[first:]:
        label = _label(turn, talk.kind) if talk.kind == TO_VALUE else None
        if turn["from"] not in talk.masked and (label or turn["value"]).strip():
            return True
    return False


def _label(turn: Mapping[str, Any], kind: str | None) -> str | None:
    label = turn.get("label") if kind is not None else None
    if label is not None and not isinstance(label, str):
        raise RowError(f"the `label` of a turn is {label!r:.60}: expected a text or null")
    return label


def _joined(spans: list[Span]) -> Iterator[Span]:
    """Join spans that touch."""
    pending: Span | None = None
    for start, stop in spans:
        if pending is not None and start == pending[1]:
            pending = (pending[0], stop)
            continue
        if pending is not None:
            yield pending
        pending = (start, stop)
    if pending is not None:
        yield pending
