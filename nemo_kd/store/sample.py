"""One source row: its tokens, its loss mask and the teacher's top-K for each answer token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_kd.topk import TopK


@dataclass(frozen=True, eq=False)
class Tokens:
    """A row's tokens and loss mask, without a teacher.

    Position t is an answer token if `loss_mask[t] = 1` and t > 0: the token at position 0 has no
    context to be predicted from. A row has `A = loss_mask[1:].sum()` answer tokens.
    """

    row: int
    """Row number in the source."""

    input_ids: NDArray[np.int32]
    """Tokens of prompt, answer and end of sequence [S]."""

    loss_mask: NDArray[np.uint8]
    """Mask [S]: 1 for answer tokens, else 0."""

    @property
    def answers(self) -> int:
        """Number of answer tokens, A."""
        return int(np.count_nonzero(self.loss_mask[1:]))

    def answer_positions(self) -> NDArray[np.int64]:
        """Return the positions t of the answer tokens [A], ascending; `input_ids[t]` is a label."""
        return np.flatnonzero(self.loss_mask[1:]) + 1


@dataclass(frozen=True, eq=False)
class Sample(Tokens):
    """An entry of a store: a row's tokens and the teacher's top-K at each answer token.

    The writer accepts numpy arrays and CPU tensors; the reader returns numpy arrays.
    """

    topk: TopK
    """The teacher's top-K, A rows: row a describes p(. | input_ids[:t]) at the a-th answer position
    t; the log-sum-exp [A, T] is at the spec's temperatures."""


@dataclass(frozen=True, eq=False)
class EncodedSample(Tokens):
    """A sample whose top-K is encoded in the profile of the store that it is written to."""

    arrays: dict[str, NDArray[Any]]
    """The profile's arrays, by field."""
