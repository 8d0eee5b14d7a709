"""NeMo's layout of conversations: the text of `GPTSFTChatDataset`, and which of it is learned.

    <extra_id_0>System\\n{system}\\n<extra_id_1>User\\n{value}\\n<extra_id_1>Assistant\\n{value}\\n<extra_id_1>

Learned are the turns of speakers that the row's `mask` does not name, each with its end of turn and
the mark that begins the next turn. With `type` VALUE_TO_TEXT a label precedes the text, and is not
learned; with TEXT_TO_VALUE it follows, and is learned instead of the text. The first turn is
context only, unless its label is learned. NeMo counts the tokens of each turn alone; here they are
found by their place in the text of the whole conversation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_kd.sft.jsonl import RowError
from nemo_kd.sft.rows import NO_ANSWER, Encoded, NoAnswerError
from nemo_kd.sft.spans import Span, encode_spans
from nemo_kd.sft.tokenizer import Tokenizer, decoded

TYPES = (None, "TEXT_TO_VALUE", "VALUE_TO_TEXT")
TO_VALUE, TO_TEXT = TYPES[1:]
NAMES = {"user": "User", "assistant": "Assistant"}
"""NeMo's name of a speaker, by the role of a message."""


@dataclass(frozen=True)
class NemoTurns:
    """Encoder of NeMo's conversations."""

    tokenizer: Tokenizer
    turn_tokens: Mapping[str, str]
    """The texts around the turns, with the keys of `sft.config.TURN_TOKENS`."""

    learn_all: bool = False
    """Whether every token is learned."""

    def __call__(self, row: Any) -> Encoded:
        """Tokenize a conversation; raise RowError if it is none, or if nothing of it is learned."""
        text, spans = self.layout(row)
        if not spans:
            raise NoAnswerError(NO_ANSWER)
        return encode_spans(self.tokenizer, text, [(0, len(text))] if self.learn_all else spans)

    def alters(self, row: Any) -> bool:
        """Return whether the tokens of a row, decoded, are another text."""
        text, spans = self.layout(row)
        return decoded(self.tokenizer, encode_spans(self.tokenizer, text, spans).input_ids) != text

    def layout(self, row: Any) -> tuple[str, list[Span]]:
        """Return a conversation's text, and the [start, stop) of the characters to learn."""
        system, kind, masked, turns = _checked(row)
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
        elif role in NAMES and not message.get("tool_calls"):
            turns.append({"from": NAMES[role], "value": message["content"]})
        else:
            raise RowError(
                f"message {number} ({role}) does not fit into NeMo's turns, which are those of "
                "user and assistant after one system prompt; use the tokenizer's chat template"
            )
    return {"system": system, "conversations": turns, "mask": "User"}


def _checked(row: Any) -> tuple[str, str | None, list[str], list[dict[str, Any]]]:
    """Return system prompt, type, masked speakers and turns; raise RowError for another shape."""
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
    return system or "", kind, masked, turns


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
