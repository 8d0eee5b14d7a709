"""Control tokens written in the text of rows, such as `<|im_end|>` within an answer.

A tokenizer reads them as the token itself: a text with one can end a turn or begin another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from nemo_kd.sft.tokenizer import Tokenizer


class ControlTokens:
    """Finds a tokenizer's control tokens in the fields of a row that are read."""

    def __init__(self, tokenizer: Tokenizer | None, fields: tuple[str, ...]) -> None:
        self.fields = fields
        inner: Any = getattr(tokenizer, "tokenizer", None)
        added = getattr(inner, "added_tokens_decoder", {})  # SentencePiece's reads none in a text
        names = [str(token) for token in added.values() if token.special and str(token)]
        self._pattern = re.compile("|".join(map(re.escape, names))) if names else None

    def first(self, row: Any) -> str:
        """Return the first control token in a row's text; empty if there is none."""
        if self._pattern is None or not isinstance(row, Mapping):
            return ""
        for text in _texts([row.get(field) for field in self.fields]):
            if found := self._pattern.search(text):
                return found[0]
        return ""


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts(list(value.values()))
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)
