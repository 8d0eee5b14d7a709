"""Prompt templates: a row's fields to tokens, exactly those of NeMo's `GPTSFTDataset`.

The template `"Q: {question} A: {answer}"` is divided before each field and the spaces before it,
and each piece is tokenized on its own. Tokens over `max_seq_length` are removed from the
truncation fields in equal shares, then from the other pieces.

NeMo's surprises are kept: spaces at both ends of a field's value are dropped, the template's
escape sequences are decoded as Latin-1, and unless the tokenizer is `space_sensitive` each piece
loses one leading space.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from nemo_kd.errors import NemoKDError
from nemo_kd.sft.jsonl import RowError
from nemo_kd.sft.tokenizer import Tokenizer

METHODS = ("left", "right")


class TemplateError(NemoKDError):
    """A prompt template, or a setting of it, that makes no tokens of any row."""


class Piece(NamedTuple):
    """A part of a template: spaces and a field's value, or where `field` is None only a text."""

    text: str
    field: str | None


class Prompted(NamedTuple):
    """A row's tokens: the prompt's, the answer's own, and all of them."""

    prompt: list[int]
    answer: list[int]
    tokens: list[int]
    truncated: bool


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """NeMo's settings of rows that have a prompt and an answer, by NeMo's names.

    Errors: TemplateError for a template that does not end with the answer's field, and for
    truncation fields that it does not have.
    """

    tokenizer: Tokenizer
    prompt_template: str
    label_key: str
    """The answer's field."""

    max_seq_length: int
    """Largest number of tokens of a row, with virtual and added ones."""

    add_bos: bool = False
    add_eos: bool = True
    add_sep: bool = False
    """Whether `sep_id` stands between prompt and answer."""

    sep_id: int = 0
    truncation_field: str | None = None
    """The fields to shorten first, separated by commas."""

    truncation_method: str = "right"
    """The end from which tokens are removed: `left` or `right`."""

    virtual_tokens: int = 0
    """Number of end-of-sequence tokens that hold places for a p-tuned prompt."""

    tokens_to_generate: int = 0
    """Room for an answer longer than the row's own."""

    def __post_init__(self) -> None:
        where = f"data.prompt_template={self.prompt_template!r}"
        if self.truncation_method not in METHODS:
            raise TemplateError(
                f"data.truncation_method={self.truncation_method}: expected left or right"
            )
        if not self._decoded.endswith(f"{{{self.label_key}}}"):
            raise TemplateError(f"{where} must end with {{{self.label_key}}}, the answer's field")
        for name, count in (("bos", self.add_bos), ("eos", self.add_eos or self.virtual_tokens)):
            if count and not self._special(name):
                raise TemplateError(f"data.add_{name}=true, but the tokenizer has no {name} token")
        for field in self._truncation_fields:
            if field not in self.fields:
                raise TemplateError(f"data.truncation_field: {where} has no field {field!r}")

    def __call__(self, row: Any) -> Prompted:
        """The tokens of one row, which must be a mapping whose fields are strings.

        Errors: RowError that names the field, but neither file nor row.
        """
        values = self._values(row)
        try:
            ids = [self._ids(piece, values) for piece in self.pieces]
        except (TypeError, ValueError) as error:  # a lone surrogate, for one
            raise RowError(f"its text cannot be tokenized ({error}); correct or drop it") from error
        return self._assemble(ids)

    @cached_property
    def fields(self) -> list[str]:
        return re.findall("{(.*?)}", self._decoded)

    @cached_property
    def pieces(self) -> list[Piece]:
        """The template's parts in order; the last one is the answer's."""
        drop = 0 if getattr(self.tokenizer, "space_sensitive", False) else 1
        pieces = []
        for part in filter(None, re.split("( *?{.+?})", self._decoded)):
            text = part[drop:] if part[0] == " " else part
            spaces = text[: len(text) - len(text.lstrip(" "))]
            field = text[len(spaces) + 1 : -1]
            is_field = text[len(spaces) :] == f"{{{field}}}" and field in self.fields
            pieces.append(Piece(spaces, field) if is_field else Piece(text, None))
        return pieces

    @cached_property
    def _decoded(self) -> str:
        """Escape sequences, which a command line gives as such, are decoded."""
        try:
            return self.prompt_template.encode().decode("unicode_escape")
        except UnicodeDecodeError as error:
            raise TemplateError(
                f"data.prompt_template={self.prompt_template!r} has a bad escape sequence: {error}"
            ) from error

    @cached_property
    def _truncation_fields(self) -> list[str]:
        fields = self.truncation_field.split(",") if self.truncation_field else []
        if fields[:1] == ["context"] and self.fields[:1] == ["input"]:
            fields[0] = "input"  # as in NeMo, for older checkpoints
        return fields

    @cached_property
    def _constant(self) -> dict[str, list[int]]:
        texts = [piece.text for piece in self.pieces if piece.field is None]
        return {text: self.tokenizer.text_to_ids(text) for text in texts}

    def _values(self, row: Any) -> dict[str, str]:
        if not isinstance(row, Mapping):
            raise RowError(f"a JSON {type(row).__name__}: expected an object with string fields")
        for field in self.fields:
            if field not in row:
                raise RowError(
                    f"no field {field!r}; the row has {sorted(row)}. Check data.label_key and "
                    "data.prompt_template, or drop the row"
                )
            if not isinstance(row[field], str):
                raise RowError(f"{field!r} is {row[field]!r:.60}: expected a string")
        return {field: row[field].strip(" ") for field in self.fields}

    def _ids(self, piece: Piece, values: Mapping[str, str]) -> list[int]:
        if piece.field is None:
            return self._constant[piece.text]
        return self.tokenizer.text_to_ids(piece.text + values[piece.field])

    def _assemble(self, ids: list[list[int]]) -> Prompted:
        """The tokens of each piece, shortened, with the added ones."""
        kept = self._shortened(ids)
        bos, eos = self._special("bos"), self._special("eos")
        prompt = bos * self.add_bos + eos * self.virtual_tokens
        prompt += [token for piece in kept[:-1] for token in piece]
        prompt += [self.sep_id] * self.add_sep
        tokens = prompt + kept[-1] + eos * self.add_eos
        return Prompted(prompt, kept[-1], tokens, kept != ids)

    def _special(self, name: str) -> list[int]:
        """The token `bos` or `eos`; empty where the tokenizer has none."""
        token: int | None = getattr(self.tokenizer, f"{name}_id")
        return [] if token is None else [token]

    def _shortened(self, ids: list[list[int]]) -> list[list[int]]:
        """As many tokens removed as there are over `max_seq_length`."""
        answer = len(ids[-1])
        excess = sum(map(len, ids)) + max(self.tokens_to_generate - answer, 0)
        excess += self.virtual_tokens + self.add_bos + self.add_sep + self.add_eos
        excess -= self.max_seq_length
        if excess <= 0:
            return ids
        kept = list(ids)

        def shorten(i: int, count: int) -> int:
            """Remove up to `count` tokens of piece i; their number."""
            count = min(count, len(kept[i]))
            left = self.truncation_method == "left"
            kept[i] = kept[i][count:] if left else kept[i][: len(kept[i]) - count]
            return count

        shares = self._shares(excess)
        for i, piece in enumerate(self.pieces):
            if piece.field in self._truncation_fields:
                excess -= shorten(i, next(shares))
        order = range(len(kept))
        if excess > 0 and self.truncation_method == "right":
            excess += min(answer, self.tokens_to_generate)  # the answer's tokens will be replaced
        for i in order if self.truncation_method == "left" else reversed(order):
            excess -= shorten(i, excess)
        return kept

    def _shares(self, excess: int) -> Iterator[int]:
        """Each truncation field's, in the order of the template; the first ones take the rest.

        Errors: RowError where a field stands in the template twice.
        """
        count = len(self._truncation_fields)
        for i in range(count):
            yield excess // count + (i < excess % count)
        raise RowError(
            "longer than data.max_seq_length, and a truncation field stands in "
            "data.prompt_template twice: its tokens cannot be divided; use each field once"
        )
