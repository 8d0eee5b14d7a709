"""One source row: its tokens, which of them are answers, and the teacher at each answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Sample:
    """A whole SFT sample with the teacher's top-K at each of its A answer tokens.

    Position t is an answer token when `loss_mask[t] = 1`; `A = loss_mask[1:].sum()`, since the
    token at position 0 is predicted from nothing. Teacher row a belongs to the a-th such t and
    holds the top-K of p(. | input_ids[:t]). The writer takes numpy arrays and CPU tensors alike;
    the reader gives numpy arrays.
    """

    row: int
    """Row number in the source; with `checksum` the sample's stable name."""

    input_ids: NDArray[np.int32]
    """[S]: prompt, answer and end-of-sequence."""

    loss_mask: NDArray[np.uint8]
    """[S]: 1 where the token is an answer token, else 0."""

    topk_ids: NDArray[np.int64]
    """[A, K]: by falling logit."""

    topk_logits: NDArray[np.float32]
    """[A, K]: z. Log-probabilities are `topk_logits - logsumexp[:, j]`, j the place of T = 1."""

    logsumexp: NDArray[np.float32]
    """[A, T]: `log sum_v exp(z_v / T)` for each of the spec's temperatures, in their order."""

    def answer_positions(self) -> NDArray[np.int64]:
        """[A]: the position t of each answer token, rising; `input_ids[t]` is the label."""
        return np.flatnonzero(self.loss_mask[1:]) + 1
