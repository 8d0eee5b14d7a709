"""Rows of an SFT file as tokens and loss masks, and the handling of unusable rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from nemo_kd.sft.control_tokens import ControlTokens
from nemo_kd.sft.files import RowFile
from nemo_kd.sft.hashed import RowError
from nemo_kd.sft.template import PromptTemplate
from nemo_kd.sft.tokenizer import Tokenizer
from nemo_kd.store.sample import Tokens

Item_co = TypeVar("Item_co", covariant=True)

NO_ANSWER = "no answer token: the answer is empty or lies beyond data.max_seq_length"


@dataclass(frozen=True, eq=False)
class Row(Tokens):
    """A tokenized row of an SFT file; `len` is its number of tokens."""

    truncated: bool = False
    cut_answer: bool = False
    cut_prompt: bool = False

    def __len__(self) -> int:
        return len(self.input_ids)


class Encoded(NamedTuple):
    """Tokens and loss mask of a row, possibly longer than `max_seq_length`."""

    input_ids: Sequence[int] | NDArray[Any]  # [S]
    loss_mask: NDArray[np.uint8]  # [S]
    truncated: bool = False
    cut_answer: bool = False
    """Of a row with a prompt and an answer: tokens of the answer are removed."""
    cut_prompt: bool = False
    """Of a row with a prompt and an answer: nothing of the prompt is left."""


class Encoder(Protocol):
    """Function from a row's value to its tokens; its RowErrors name neither file nor row."""

    def __call__(self, value: Any, /) -> Encoded: ...

    def alters(self, value: Any, /) -> bool:
        """Return whether the tokens of a row, decoded, are another text than the row's."""


class Check(NamedTuple):
    """What the check of a usable row found."""

    truncated: bool = False
    cut_answer: bool = False
    cut_prompt: bool = False
    altered: bool = False
    """The tokens are not those of the text: see `SFTRows.altered_by`."""
    length: int = 0
    """Number of tokens."""
    control: str = ""
    """A control token that is written in the row's text."""
    twice: bool = False
    """The row ends with two end-of-sequence tokens: its text has one already."""


class NoAnswerError(RowError):
    """Error for a row without an answer token within `max_seq_length`."""


@dataclass(frozen=True)
class BadRows:
    """Policy for unusable rows: which are dropped and which raise an error."""

    drop_bad: bool
    """Whether to drop rows that cannot be read or whose logits are NaN (`on_bad_row=drop`)."""

    drop_unanswered: bool
    """Whether to drop rows without an answer token (`data.no_answer=drop`)."""

    def drops(self, error: RowError) -> bool:
        return self.drop_unanswered if isinstance(error, NoAnswerError) else self.drop_bad

    @contextmanager
    def skipped(self, dropped: list[RowError]) -> Iterator[None]:
        """Context manager that appends a RowError to `dropped` if its row is to be dropped.

        Other errors propagate.
        """
        try:
            yield
        except RowError as error:
            if not self.drops(error):
                raise
            dropped.append(error)


class SFTRows:
    """Random access to the tokenized rows of a file.

    `template`: the settings that determine the tokens, as a store records them. `verbatim`: the
    rows of the file's text, if these are another reader's. `tokenizer`: the one of the tokens; None
    if it is not known. `fields`: the fields of a row whose texts are read.
    """

    samples_per_row = 1

    def __init__(
        self,
        file: RowFile,
        encode: Encoder,
        max_seq_length: int,
        template: Mapping[str, Any] | None = None,
        verbatim: SFTRows | None = None,
        tokenizer: Tokenizer | None = None,
        fields: tuple[str, ...] = (),
    ) -> None:
        self.file, self.encode, self.max_seq_length = file, encode, max_seq_length
        self.template, self.verbatim = dict(template or {}), verbatim
        self.tokenizer = tokenizer
        self._control = ControlTokens(tokenizer, fields)

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, row: int) -> Row:
        """Tokenize a row; raise RowError, naming file, row and reason, if it is unusable."""
        return self.tokenized(row, self.file[row])

    def tokenized(self, row: int, value: Any) -> Row:
        """Tokenize a row whose value has been read; raise RowError, as `self[row]` does."""
        with errors_name(self.file, row):
            encoded = self.encode(value)
            ids = encoded.input_ids
            input_ids = np.asarray(ids[: self.max_seq_length], dtype=np.int32)
            loss_mask = encoded.loss_mask[: self.max_seq_length].copy()
            loss_mask[:1] = 0  # the first token has no context to be predicted from
            if not loss_mask.any():
                raise NoAnswerError(NO_ANSWER)
        truncated = encoded.truncated or len(ids) > len(input_ids)
        return Row(row, input_ids, loss_mask, truncated, encoded.cut_answer, encoded.cut_prompt)

    @property
    def limit(self) -> str:
        """What truncates rows, for a message."""
        return f"data.max_seq_length={self.max_seq_length}"

    @property
    def altered_by(self) -> str:
        """What changes the text of altered rows, for a message."""
        if self.verbatim is not None:
            return "data.reader=nemo gives other tokens than the text of the file has"
        return (
            "the tokens do not give back the row's text: the tokenizer normalizes it, or the chat "
            "template takes something off an answer, such as spaces at its ends"
        )

    def check(self, row: int) -> Check:
        """Tokenize a row and compare it with its text; raise RowError if the row is unusable."""
        value = self.file[row]
        found = self.tokenized(row, value)
        with errors_name(self.file, row):
            altered = self._is_altered(found, value)
        control = self._control.first(value)
        return Check(
            truncated=found.truncated,
            cut_answer=found.cut_answer,
            cut_prompt=found.cut_prompt,
            altered=altered,
            length=len(found),
            control=control,
            twice=self._ends_twice(found),
        )

    def _ends_twice(self, found: Row) -> bool:
        if self.tokenizer is None or not self.template.get("add_eos"):
            return False
        end = self.tokenizer.eos_id
        is_ended = self.template.get("format") in ("prompt", "text")
        return is_ended and found.input_ids[-2:].tolist() == [end, end]

    def _is_altered(self, found: Row, value: Any) -> bool:
        if self.verbatim is None:
            return self.encode.alters(value)
        try:
            own = self.verbatim.tokenized(found.row, value)
        except RowError:
            return True
        same = np.array_equal(found.input_ids, own.input_ids)
        return not (same and np.array_equal(found.loss_mask, own.loss_mask))


@dataclass(frozen=True)
class PromptEncoder:
    """Encoder of rows that have a prompt and an answer."""

    template: PromptTemplate
    answer_only_loss: bool
    """Whether only the answer is learned."""

    def __call__(self, value: Any) -> Encoded:
        prompted = self.template(value)
        if not prompted.answer or self._is_blank(value):
            raise NoAnswerError(NO_ANSWER)
        mask = np.ones(len(prompted.tokens), dtype=np.uint8)
        if self.answer_only_loss:
            mask[: len(prompted.prompt)] = 0
        cut = (prompted.cut_answer, prompted.cut_prompt)
        return Encoded(prompted.tokens, mask, prompted.truncated, *cut)

    def alters(self, value: Any) -> bool:
        return self.template.alters(value)

    def _is_blank(self, value: Any) -> bool:
        """Whether the answer's own field is empty; NeMo learns the template's space before it."""
        template = self.template
        return template.reader != "nemo" and not value[template.label_key].strip()


@contextmanager
def errors_name(file: RowFile, row: int) -> Iterator[None]:
    """Context manager that prefixes the messages of RowErrors with file and row."""
    try:
        yield
    except RowError as error:
        raise type(error)(f"{file.where(row)}: {error}") from error


class Indexed(Protocol[Item_co]):
    """Anything that can be indexed by row number, such as rows or prompts."""

    def __getitem__(self, row: int) -> Item_co: ...


def readable(
    rows: Indexed[Item_co], numbers: Iterable[int], bad: BadRows, dropped: list[RowError]
) -> Iterator[Item_co]:
    """Yield the usable rows among `numbers`.

    Errors of rows that `bad` drops are appended to `dropped`; the RowError of any other unusable
    row is raised.
    """
    for number in numbers:
        with bad.skipped(dropped):
            yield rows[number]
