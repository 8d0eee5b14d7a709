"""One source row: its tokens, which of them are answers, and the teacher at each answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nemo_kd.topk import TopK


@dataclass(frozen=True, eq=False)
class Tokens:
    """A row's tokens and loss mask, without a teacher.

    Position t is an answer token when `loss_mask[t] = 1` and t > 0: the token at position 0 is
    predicted from nothing. A row has `A = loss_mask[1:].sum()` answer tokens.
    """

    row: int
    """Row number in the source."""

    input_ids: NDArray[np.int32]
    """[S]: prompt, answer and end-of-sequence."""

    loss_mask: NDArray[np.uint8]
    """[S]: 1 where the token is an answer token, else 0."""

    @property
    def answers(self) -> int:
        """A, the number of answer tokens."""
        return int(np.count_nonzero(self.loss_mask[1:]))

    def answer_positions(self) -> NDArray[np.int64]:
        """[A]: the position t of each answer token, ascending; `input_ids[t]` is its label."""
        return np.flatnonzero(self.loss_mask[1:]) + 1


@dataclass(frozen=True, eq=False)
class Sample(Tokens):
    """An entry of a store: a row's tokens and the teacher's top-K at each answer token.

    The writer takes numpy arrays and CPU tensors alike; the reader returns numpy arrays.
    """

    topk: TopK
    """A rows: row a is the teacher's p(. | input_ids[:t]) at the a-th answer position t, with the
    log-sum-exp [A, T] at the spec's temperatures."""
