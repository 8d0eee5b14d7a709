"""The rows of an SFT file as tokens and loss masks, and the errors of those that cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from nemo_kd.sft.jsonl import JsonlFile, RowError
from nemo_kd.sft.template import PromptTemplate
from nemo_kd.store.sample import Tokens

Item_co = TypeVar("Item_co", covariant=True)

NO_ANSWER = (
    "no answer token: the answer is empty or lies beyond data.max_seq_length; raise it, or set "
    "data.no_answer=drop to leave such rows out"
)


@dataclass(frozen=True, eq=False)
class Row(Tokens):
    """A row of an SFT file as a dump reads it."""

    truncated: bool = False

    def __len__(self) -> int:
        return len(self.input_ids)


class Encoded(NamedTuple):
    """A row's tokens, which may be more than the limit."""

    input_ids: Sequence[int] | NDArray[Any]  # [S]
    loss_mask: NDArray[np.uint8]  # [S]
    truncated: bool = False


class NoAnswerError(RowError):
    """A row without an answer token within the limit."""


@dataclass(frozen=True)
class BadRows:
    """Which unusable rows are left out instead of being errors."""

    drop_bad: bool
    """`on_bad_row=drop`: those that cannot be read or for which the teacher's logits are NaN."""

    drop_unanswered: bool
    """`data.no_answer=drop`: those without an answer token."""

    def drops(self, error: RowError) -> bool:
        return self.drop_unanswered if isinstance(error, NoAnswerError) else self.drop_bad

    @contextmanager
    def skipped(self, dropped: list[RowError]) -> Iterator[None]:
        """Append an error that is dropped to `dropped` instead of raising it."""
        try:
            yield
        except RowError as error:
            if not self.drops(error):
                raise
            dropped.append(error)


class SFTRows:
    """Random access to the rows of a file as tokens.

    `encode` makes tokens of a row's value; its RowErrors need not name file and row.
    """

    samples_per_row = 1

    def __init__(
        self, file: JsonlFile, encode: Callable[[Any], Encoded], max_seq_length: int
    ) -> None:
        self.file, self.encode, self.max_seq_length = file, encode, max_seq_length

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, row: int) -> Row:
        """Errors: RowError that names file, row and reason."""
        value = self.file[row]
        with errors_name(self.file, row):
            ids, mask, truncated = self.encode(value)
            input_ids = np.asarray(ids[: self.max_seq_length], dtype=np.int32)
            loss_mask = mask[: self.max_seq_length].copy()
            loss_mask[:1] = 0  # nothing comes before the first token to predict it from
            if not loss_mask.any():
                raise NoAnswerError(NO_ANSWER)
        return Row(row, input_ids, loss_mask, truncated or len(ids) > len(input_ids))

    def check(self, row: int) -> None:
        """Errors: RowError for a row that `[row]` would raise one for."""
        self[row]


def prompt_rows(file: JsonlFile, template: PromptTemplate, answer_only_loss: bool) -> SFTRows:
    """The rows of a file with prompts and answers."""

    def encode(value: Any) -> Encoded:
        prompted = template(value)
        if not prompted.answer:
            raise NoAnswerError(NO_ANSWER)
        mask = np.ones(len(prompted.tokens), dtype=np.uint8)
        if answer_only_loss:
            mask[: len(prompted.prompt)] = 0
        return Encoded(prompted.tokens, mask, prompted.truncated)

    return SFTRows(file, encode, template.max_seq_length)


@contextmanager
def errors_name(file: JsonlFile, row: int) -> Iterator[None]:
    """Put file and row in front of the messages of RowErrors."""
    try:
        yield
    except RowError as error:
        raise type(error)(f"{file.path}, row {row}: {error}") from error


class Indexed(Protocol[Item_co]):
    """Rows, or what is made of them."""

    def __getitem__(self, row: int) -> Item_co: ...


def readable(
    rows: Indexed[Item_co], numbers: Iterable[int], bad: BadRows, dropped: list[RowError]
) -> Iterator[Item_co]:
    """The rows that can be used; the errors of those that `bad` drops are appended to `dropped`.

    Errors: RowError of any other row.
    """
    for number in numbers:
        with bad.skipped(dropped):
            yield rows[number]
