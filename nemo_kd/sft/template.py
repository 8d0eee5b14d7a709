"""Prompt templates: convert a row's fields to tokens.

A template such as `"Q: {question} A: {answer}"` is split before each field and the spaces that
precede it, and each piece is tokenized separately, as in NeMo's `GPTSFTDataset`. Tokens beyond
`max_seq_length` are removed from the truncation fields in equal shares, then from any piece.

With the reader `verbatim` the tokens are those of the text itself. With `nemo` they are exactly
NeMo's: leading and trailing spaces of a field's value are dropped, the template's bytes are decoded
as Latin-1 together with its escape sequences, and unless the tokenizer is `space_sensitive` each
piece loses one leading space, which such a tokenizer adds to every text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from nemo_kd.errors import NemoKDError
from nemo_kd.sft.fields import refuse_unread
from nemo_kd.sft.hashed import RowError
from nemo_kd.sft.tokenizer import Tokenizer, continuation, decoded

METHODS = ("left", "right")
ESCAPES = re.compile(r"\\(?:[nrt\\]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8})")
"""Escape sequences of a template, which command lines pass literally; other backslashes stay."""


class TemplateError(NemoKDError):
    """Error for an invalid prompt template or template setting."""


class Piece(NamedTuple):
    """A part of a template: `text` followed by a field's value, or only `text` if field is None."""

    text: str
    field: str | None


class Prompted(NamedTuple):
    """Tokens of a row: of the prompt, of the answer without end of sequence, and all of them."""

    prompt: list[int]
    answer: list[int]
    tokens: list[int]
    truncated: bool
    cut_answer: bool
    """Tokens of the answer are removed; an end of sequence follows all the same, as in NeMo."""
    cut_prompt: bool
    """Nothing of the prompt is left."""


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """Tokenizer of rows with a prompt and an answer; the settings have NeMo's names.

    Raises TemplateError if the template does not end with the answer's field, or lacks a truncation
    field, or if a required special token is missing.
    """

    tokenizer: Tokenizer
    prompt_template: str
    label_key: str
    """Name of the answer's field."""

    max_seq_length: int
    """Maximum number of tokens per row, including virtual and special tokens."""

    reader: str = "verbatim"
    """`verbatim` or `nemo`."""

    add_bos: bool = False
    add_eos: bool = True
    add_sep: bool = False
    """Whether to insert `sep_id` between prompt and answer."""

    sep_id: int = 0
    truncation_field: str | None = None
    """Comma-separated fields to shorten first."""

    truncation_method: str = "right"
    """The end from which tokens are removed: `left` or `right`."""

    virtual_tokens: int = 0
    """Number of end-of-sequence tokens inserted as placeholders for a p-tuned prompt."""

    tokens_to_generate: int = 0
    """Minimum number of tokens to reserve for the answer."""

    is_default: bool = False
    """Whether nobody chose the template, so that a row that asks for more than it reads is bad."""

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
                raise TemplateError(
                    f"data.truncation_field={self.truncation_field}: {where} has no field "
                    f"{field!r}; set data.truncation_field={self.fields[0]} to shorten that first, "
                    "or null to shorten the end"
                )

    def __call__(self, row: Any) -> Prompted:
        """Tokenize a row, which must be a mapping with string fields.

        Raises RowError, naming the field but neither file nor row.
        """
        return self._assemble(self._pieces_ids(self._values(row)))

    def alters(self, row: Any) -> bool:
        """Return whether the tokens of a row, decoded, are another text than the row's.

        Special and virtual tokens are not compared. Raises RowError, as a call does.
        """
        values = self._values(row)
        ids = [token for piece in self._pieces_ids(values) for token in piece]
        texts = (piece.text + (values[piece.field] if piece.field else "") for piece in self.pieces)
        return decoded(self.tokenizer, ids) != "".join(texts)

    @cached_property
    def fields(self) -> list[str]:
        return field_names(self._decoded)

    @cached_property
    def pieces(self) -> list[Piece]:
        """The parts of the template in order; the last is the answer's field."""
        drop = self.reader == "nemo" and not getattr(self.tokenizer, "space_sensitive", False)
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
        """The template with decoded escape sequences, which command lines pass literally."""
        try:
            if self.reader == "nemo":
                return self.prompt_template.encode().decode("unicode_escape")
            return unescaped(self.prompt_template)
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
    def _constant(self) -> dict[int, list[int]]:
        """The tokens of the pieces without a field, by their place."""
        pieces = enumerate(self.pieces)
        return {i: self._tokens(i, piece.text) for i, piece in pieces if piece.field is None}

    def _values(self, row: Any) -> dict[str, str]:
        if not isinstance(row, Mapping):
            raise RowError(f"a JSON {type(row).__name__}: expected an object with string fields")
        for field in self.fields:
            if field not in row:
                raise RowError(
                    f"no field {field!r}; the row has {sorted(row)}. Check data.label_key and "
                    "data.prompt_template, or remove the row"
                )
            if not isinstance(row[field], str):
                raise RowError(f"{field!r} is {row[field]!r:.60}: expected a string")
        if self.is_default:
            refuse_unread(row, self.fields, f"data.prompt_template={self.prompt_template!r}")
        if self.reader == "nemo":
            return {field: row[field].strip(" ") for field in self.fields}
        return {field: row[field] for field in self.fields}

    def _pieces_ids(self, values: Mapping[str, str]) -> list[list[int]]:
        try:
            return [
                self._tokens(i, piece.text + values[piece.field])
                if piece.field is not None
                else self._constant[i]
                for i, piece in enumerate(self.pieces)
            ]
        except (TypeError, ValueError) as error:  # for example a lone surrogate
            raise RowError(f"its text cannot be tokenized ({error}); fix or remove it") from error

    def _tokens(self, place: int, text: str) -> list[int]:
        """Tokenize a piece; pieces after the first continue the text before them."""
        if not place or self.reader == "nemo":
            return self.tokenizer.text_to_ids(text)
        return self._continued(text)

    @cached_property
    def _continued(self) -> Callable[[str], list[int]]:
        return continuation(self.tokenizer)

    def _assemble(self, ids: list[list[int]]) -> Prompted:
        """Truncate the tokens of the pieces and add special and virtual tokens."""
        kept = self._shortened(ids)
        bos, eos = self._special("bos"), self._special("eos")
        prompt = bos * self.add_bos + eos * self.virtual_tokens
        prompt += [token for piece in kept[:-1] for token in piece]
        prompt += [self.sep_id] * self.add_sep
        tokens = prompt + kept[-1] + eos * self.add_eos
        lost = any(ids[:-1]) and not any(kept[:-1])
        return Prompted(prompt, kept[-1], tokens, kept != ids, kept[-1] != ids[-1], lost)

    def _special(self, name: str) -> list[int]:
        """Return the id of `bos` or `eos` in a list, empty if the tokenizer has no such token."""
        token: int | None = getattr(self.tokenizer, f"{name}_id")
        return [] if token is None else [token]

    def _shortened(self, ids: list[list[int]]) -> list[list[int]]:
        """Remove as many tokens from the pieces as exceed `max_seq_length`."""
        answer = len(ids[-1])
        excess = sum(map(len, ids)) + max(self.tokens_to_generate - answer, 0)
        excess += self.virtual_tokens + self.add_bos + self.add_sep + self.add_eos
        excess -= self.max_seq_length
        if excess <= 0:
            return ids
        kept = list(ids)

        def shorten(i: int, count: int) -> int:
            """Remove up to `count` tokens from piece i; return the number removed."""
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
        """Yield each truncation field's share of the excess, in template order.

        The first fields take the remainder of the division. Raises RowError if a truncation field
        occurs twice in the template.
        """
        count = len(self._truncation_fields)
        for i in range(count):
            yield excess // count + (i < excess % count)
        raise RowError(
            "longer than data.max_seq_length, and a truncation field stands in "
            "data.prompt_template twice: its tokens cannot be divided; use each field once"
        )


def field_names(template: str) -> list[str]:
    """Return the fields of a template, in order."""
    return re.findall("{(.*?)}", template)


def unescaped(text: str) -> str:
    """Return a text with its escape sequences decoded; raise UnicodeDecodeError for a bad one."""
    return ESCAPES.sub(lambda found: found[0].encode().decode("unicode_escape"), text)
