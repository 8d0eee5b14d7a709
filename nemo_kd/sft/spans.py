"""Tokens and loss mask of a text of which some spans of characters are learned.

The text is tokenized as a whole: special tokens in it are recognized and none are added, as by
transformers' `apply_chat_template(tokenize=True)`. Where a token would join an end of a span with
what is beside it (a header's newline with the spaces that an answer begins with), the text is
tokenized in parts that end where the spans do, as a server tokenizes a prompt alone. So the learned
tokens are exactly the text of the spans.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from nemo_kd.sft.hashed import RowError
from nemo_kd.sft.rows import Encoded
from nemo_kd.sft.tokenizer import Tokenizer, continuation

Span = tuple[int, int]  # [start, stop) in characters

NEARBY = 32
"""Number of characters on each side of a span's end that are tokenized to look at the end."""


def encode_spans(tokenizer: Tokenizer, text: str, spans: Sequence[Span]) -> Encoded:
    """Tokenize a text; the loss mask is 1 on the tokens of `spans`.

    Spans are in increasing order and disjoint. For a tokenizer that gives no offsets (a slow one of
    transformers, SentencePiece) the tokens before the end of a span are those of the text up to it.

    Raises RowError for a lone surrogate.
    """
    _check_unicode(text)
    spans = [span for span in spans if span[0] < span[1]]
    ends = sorted({end for span in spans for end in span} - {0, len(text)})
    if not any(_is_joined(tokenizer, text, end) for end in ends):
        found = _places(tokenizer, text)
        if all(found.is_between(end) for end in ends):
            mask = np.zeros(len(found.ids), dtype=np.uint8)
            for start, stop in spans:
                mask[found.count(start) : found.count(stop)] = 1
            return Encoded(found.ids, mask)
        _check_added(tokenizer, text, [found.around(end) for end in ends])
    return _in_parts(tokenizer, text, spans, [0, *ends, len(text)])


def _check_added(tokenizer: Tokenizer, text: str, joined: list[Span | None]) -> None:
    """Raise RowError if a token to be divided is a special or added one."""
    library: Any = getattr(tokenizer, "tokenizer", None)
    added = getattr(library, "added_tokens_encoder", {})
    for token in [text[slice(*span)] for span in joined if span]:
        if token in added and not token.isspace():
            raise RowError(
                f"what is learned ends inside the token {token!r}; mark it with {{% generation %}} "
                "in a template of your own (data.chat_template=FILE), or remove the row"
            )


def _in_parts(
    tokenizer: Tokenizer, text: str, spans: Sequence[Span], ends: Sequence[int]
) -> Encoded:
    tokens, learned = continuation(tokenizer), {start for start, _ in spans}
    ids, mask = list[int](), list[int]()
    for start, stop in pairwise(ends):
        part = text[start:stop]
        ids += tokens(part) if start else tokenizer.text_to_ids(part)
        mask += [int(start in learned)] * (len(ids) - len(mask))
    return Encoded(ids, np.array(mask, np.uint8))


def _is_joined(tokenizer: Tokenizer, text: str, position: int) -> bool:
    """Return whether the whitespace around a position surely is of one token.

    Decided by tokenizing only what is nearby, which saves tokenizing the text twice. If the token
    ends before that on both sides, and the tokenizer splits texts into words first, then the rest
    of the text does not matter.
    """
    if not (text[position - 1].isspace() and text[position].isspace()):
        return False
    library: Any = getattr(tokenizer, "tokenizer", None)
    if not getattr(library, "is_fast", False) or library.backend_tokenizer.pre_tokenizer is None:
        return False
    start = max(position - NEARBY, 0)
    nearby = text[start : position + NEARBY]
    token = _Offsets(library, nearby).around(position - start)
    return token is not None and token[0] > 0 and token[1] < len(nearby)


def _places(tokenizer: Tokenizer, text: str) -> _Offsets | _Prefixes:
    library = getattr(tokenizer, "tokenizer", None)
    is_fast = getattr(library, "is_fast", False)
    return _Offsets(library, text) if is_fast else _Prefixes(tokenizer, text)


class _Offsets:
    """Token positions by the offsets of a fast tokenizer.

    Tokens tile the text: characters that no token claims, such as spaces where the tokenizer trims
    its offsets, belong to the next token. The tokens of one character share its offsets.
    """

    def __init__(self, library: Any, text: str) -> None:
        backend = library.backend_tokenizer
        if backend.truncation is None and backend.padding is None:
            made = backend.encode(text, add_special_tokens=False)
        else:  # the library unsets both
            made = library(text, add_special_tokens=False, verbose=False).encodings[0]
        self.ids: list[int] = made.ids
        self.offsets: Callable[[int], Span] = made.token_to_chars
        self._counts: dict[int, tuple[int, int]] = {
            0: (0, 0),
            len(text): (len(self.ids), len(self.ids)),
        }

    def is_between(self, position: int) -> bool:
        """Return whether no token holds characters on both sides of a position."""
        return self.around(position) is None

    def around(self, position: int) -> Span | None:
        """Return the span of the tokens that hold characters on both sides of a position."""
        ending, starting = self._before(position)
        if ending >= starting:
            return None
        return self._start(ending), self._stop(starting - 1)

    def count(self, position: int) -> int:
        """Return the number of tokens that start before a position."""
        return self._before(position)[1]

    def _before(self, position: int) -> tuple[int, int]:
        """Return how many tokens end at or before a position, and how many start before it."""
        if position not in self._counts:
            tokens = range(len(self.ids))
            ending = bisect_right(tokens, position, key=self._stop)
            self._counts[position] = ending, bisect_left(tokens, position, key=self._start)
        return self._counts[position]

    def _start(self, token: int) -> int:
        start = self.offsets(token)[0]
        return min(start, self._stop(token - 1)) if token else 0

    def _stop(self, token: int) -> int:
        return self.offsets(token)[1]


class _Prefixes:
    """Token positions by tokenizing the text up to them."""

    def __init__(self, tokenizer: Tokenizer, text: str) -> None:
        self.tokenizer, self.text = tokenizer, text
        self.ids = tokenizer.text_to_ids(text)

    def is_between(self, position: int) -> bool:
        ids = self.tokenizer.text_to_ids(self.text[:position])
        return self.ids[: len(ids)] == ids

    def around(self, position: int) -> Span | None:
        """Return None: the spans of tokens are not known."""

    def count(self, position: int) -> int:
        return len(self.tokenizer.text_to_ids(self.text[:position]))


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            f"its text cannot be tokenized: {text[error.start]!r} is half a character (a lone "
            "surrogate); fix or remove it"
        ) from error
