"""Tokens and loss mask of a text of which some spans of characters are learned.

The text is tokenized once, as a whole: special tokens in it are recognized and none are added, as
by transformers' `apply_chat_template(tokenize=True)`. A token is learned if it holds a character of
a span. Where a tokenizer joins whitespace beside a span with the span's own (a header's newline
with the newline that an answer begins with), that token is learned as well; a token that joins
anything else with a span's text is an error.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
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
    _check_unicode(text)
    return _masked(_places(tokenizer, text), spans)


def encode_exactly(tokenizer: Tokenizer, text: str, spans: Sequence[Span]) -> Encoded:
    """Tokenize a text as `encode_spans` does, but learn no character outside of `spans`.

    If a token joins the end of a span with what is beside it, the text is tokenized in parts, which
    end where the spans do.
    """
    _check_unicode(text)
    ends = sorted({0, len(text), *(end for span in spans for end in span)})
    if not any(_is_joined(tokenizer, text, end) for end in ends):
        find = _places(tokenizer, text)
        if all(find.is_between(end) for end in ends):
            return _masked(find, spans)
    tokens, learned = continuation(tokenizer), {start for start, _ in spans}
    ids, mask = list[int](), list[int]()
    for start, stop in pairwise(ends):
        part = text[start:stop]
        ids += tokens(part) if start else tokenizer.text_to_ids(part)
        mask += [int(start in learned)] * (len(ids) - len(mask))
    return Encoded(ids, np.array(mask, np.uint8))


NEIGHBOURHOOD = 32


def _is_joined(tokenizer: Tokenizer, text: str, position: int) -> bool:
    """Return whether the characters around a position surely are of one token.

    Decided by tokenizing only these characters, which saves tokenizing the text twice. That the
    token ends before them on both sides shows that others do not matter, if the tokenizer splits
    the text into words first.
    """
    if not text[position - 1 : position].isspace() or not text[position : position + 1].isspace():
        return False
    library: Any = getattr(tokenizer, "tokenizer", None)
    if not getattr(library, "is_fast", False) or library.backend_tokenizer.pre_tokenizer is None:
        return False
    start = max(position - NEIGHBOURHOOD, 0)
    near = text[start : position + NEIGHBOURHOOD]
    find = _Offsets(library, near)
    within = find.around(position - start)
    return within is not None and within[0] > 0 and within[1] < len(near)


def _places(tokenizer: Tokenizer, text: str) -> _Offsets | _Prefixes:
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
        backend = library.backend_tokenizer
        if backend.truncation is None and backend.padding is None:
            made = backend.encode(text, add_special_tokens=False)
        else:  # the library sets both
            made = library(text, add_special_tokens=False, verbose=False).encodings[0]
        self.text = text
        self.ids: list[int] = made.ids
        self.offsets: Callable[[int], Span] = made.token_to_chars
        self._counts = {0: (0, 0), len(text): (len(self.ids), len(self.ids))}

    def is_between(self, position: int) -> bool:
        """Return whether no token holds characters on both sides of a position."""
        return self.around(position) is None

    def around(self, position: int) -> Span | None:
        """Return the span of the token that holds characters on both sides of a position."""
        ending, starting = self._before(position)
        if ending >= starting:
            return None
        return self._start(ending), self._stop(starting - 1)

    def first(self, start: int) -> int:
        """Index of the first token that holds a character at or after `start`."""
        token, whole = self._before(start)
        if token >= whole:
            return whole
        self._check_space(token, self._start(token), start)
        return token

    def end(self, stop: int) -> int:
        """Index after the last token that holds a character before `stop`."""
        ending, starting = self._before(stop)
        if ending < starting:
            self._check_space(starting - 1, stop, self._stop(starting - 1))
        return starting

    def _before(self, position: int) -> tuple[int, int]:
        """Return how many tokens end at or before a position, and how many start before it."""
        if position not in self._counts:
            tokens = range(len(self.ids))
            ending = bisect_right(tokens, position, key=self._stop)
            starting = bisect_left(tokens, position, key=self._start)
            self._counts[position] = ending, starting
        return self._counts[position]

    def _start(self, token: int) -> int:
        start = self.offsets(token)[0]
        return min(start, self._stop(token - 1)) if token else 0

    def _stop(self, token: int) -> int:
        return self.offsets(token)[1]

    def _check_space(self, token: int, start: int, stop: int) -> None:
        """Raise RowError unless the part of a token outside the span is whitespace."""
        if not self.text[start:stop].isspace():
            joined = self.text[self._start(token) : self._stop(token)]
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
