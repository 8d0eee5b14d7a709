"""Tokens and loss mask of a text of which some spans of characters are learned.

The text is tokenized once, as a whole: special tokens in it are recognized and none are added, as
by transformers' `apply_chat_template(tokenize=True)`. A token is learned if it holds a character of
a span. Where a tokenizer joins whitespace beside a span with the span's own (a header's newline
with the newline that an answer begins with), that token is learned as well; a token that joins
anything else with a span's text is an error.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from nemo_kd.sft.jsonl import RowError
from nemo_kd.sft.rows import Encoded
from nemo_kd.sft.tokenizer import Tokenizer, continuation

Span = tuple[int, int]  # [start, stop) in characters


def encode_spans(tokenizer: Tokenizer, text: str, spans: Iterable[Span]) -> Encoded:
    """Tokenize a text; the loss mask is 1 on the tokens of `spans`.

    Spans are in increasing order and disjoint. A tokenizer that gives no offsets (a slow one of
    transformers, SentencePiece) finds a span's tokens by tokenizing the text up to its ends.

    Raises RowError for a lone surrogate, or if the end of a span lies inside a token.
    """
    return _masked(_places(tokenizer, text), spans)


def encode_exactly(tokenizer: Tokenizer, text: str, spans: Sequence[Span]) -> Encoded:
    """Tokenize a text as `encode_spans` does, but learn no character outside of `spans`.

    If a token joins the end of a span with what is beside it, the text is tokenized in parts, which
    end where the spans do.
    """
    find = _places(tokenizer, text)
    ends = sorted({0, len(text), *(end for span in spans for end in span)})
    if all(find.is_between(end) for end in ends):
        return _masked(find, spans)
    tokens, learned = continuation(tokenizer), {start for start, _ in spans}
    ids, mask = list[int](), list[int]()
    for start, stop in pairwise(ends):
        part = text[start:stop]
        ids += tokens(part) if start else tokenizer.text_to_ids(part)
        mask += [int(start in learned)] * (len(ids) - len(mask))
    return Encoded(ids, np.array(mask, np.uint8))


def _places(tokenizer: Tokenizer, text: str) -> _Offsets | _Prefixes:
    _check_unicode(text)
    library = getattr(tokenizer, "tokenizer", None)
    is_fast = getattr(library, "is_fast", False)
    return _Offsets(library, text) if is_fast else _Prefixes(tokenizer, text)


def _masked(find: _Offsets | _Prefixes, spans: Iterable[Span]) -> Encoded:
    mask = np.zeros(len(find.ids), dtype=np.uint8)
    for start, stop in spans:
        if start < stop:
            mask[find.first(start) : find.end(stop)] = 1
    return Encoded(find.ids, mask)


class _Offsets:
    """Token positions by the offsets of a fast tokenizer.

    Tokens tile the text: characters that no token claims, such as spaces where the tokenizer trims
    its offsets, belong to the next token. The tokens of one character share its offsets.
    """

    def __init__(self, library: Any, text: str) -> None:
        with_offsets = {"return_offsets_mapping": True, "return_attention_mask": False}
        made = library(text, add_special_tokens=False, verbose=False, **with_offsets)
        self.text = text
        self.ids: list[int] = made["input_ids"]
        self.offsets: list[Span] = made["offset_mapping"]

    def is_between(self, position: int) -> bool:
        """Return whether no token holds characters on both sides of a position."""
        return self._ending_by(position) >= self._starting_before(position)

    def first(self, start: int) -> int:
        """Index of the first token that holds a character at or after `start`."""
        token, whole = self._ending_by(start), self._starting_before(start)
        if token >= whole:
            return whole
        self._check_space(token, self._start(token), start)
        return token

    def end(self, stop: int) -> int:
        """Index after the last token that holds a character before `stop`."""
        end = self._starting_before(stop)
        if self._ending_by(stop) < end:
            self._check_space(end - 1, stop, self.offsets[end - 1][1])
        return end

    def _start(self, token: int) -> int:
        start = self.offsets[token][0]
        return min(start, self.offsets[token - 1][1]) if token else 0

    def _starting_before(self, position: int) -> int:
        return bisect_left(range(len(self.ids)), position, key=self._start)

    def _ending_by(self, position: int) -> int:
        return bisect_right(self.offsets, position, key=_stop)

    def _check_space(self, token: int, start: int, stop: int) -> None:
        """Raise RowError unless the part of a token outside the span is whitespace."""
        if not self.text[start:stop].isspace():
            joined = self.text[self._start(token) : self.offsets[token][1]]
            raise RowError(
                f"the token of {joined!r:.60} joins {self.text[start:stop]!r:.60}, which is not "
                "learned, with learned text; change the template so that a special token or a line "
                "break separates them, or remove the row"
            )


class _Prefixes:
    """Token positions by tokenizing prefixes of the text."""

    def __init__(self, tokenizer: Tokenizer, text: str) -> None:
        self.tokenizer, self.text = tokenizer, text
        self.ids = tokenizer.text_to_ids(text)

    def is_between(self, position: int) -> bool:
        ids = self.tokenizer.text_to_ids(self.text[:position])
        return self.ids[: len(ids)] == ids

    def first(self, start: int) -> int:
        return self._prefix(start)

    def end(self, stop: int) -> int:
        return self._prefix(stop)

    def _prefix(self, position: int) -> int:
        ids = self.tokenizer.text_to_ids(self.text[:position])
        if self.ids[: len(ids)] != ids:
            raise RowError(
                "the tokenizer gives no offsets, and the tokens of the text up to "
                f"{self.text[:position][-20:]!r} change with what follows; use a fast tokenizer (a "
                "directory with tokenizer.json), or remove the row"
            )
        return len(ids)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            f"its text cannot be tokenized: {text[error.start]!r} is half a character (a lone "
            "surrogate); fix or remove it"
        ) from error


def _stop(offset: Span) -> int:
    return offset[1]
