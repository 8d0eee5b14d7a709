"""The ids of a vocabulary's padding, which a top-K of another program may have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_kd.topk import ABSENT_ID

MAX_PADDING = 64 * 128
"""Largest number of padding ids: Megatron pads a vocabulary to a multiple of 128 times TP."""


@dataclass
class Padding:
    """Counts of vocabulary padding ids that were dropped from the top-K."""

    ids: int = 0
    tokens: int = 0
    """Number of answer tokens whose top-K contained padding ids."""
    mass: float = 0.0
    """Total probability of the dropped ids, summed over answer tokens."""

    def add(self, other: Padding) -> None:
        self.ids += other.ids
        self.tokens += other.tokens
        self.mass += other.mass


def width_of(ids: NDArray[Any]) -> int:
    """Return the largest number of ids [A, n] that a token has, without absent ones."""
    return int((ids != ABSENT_ID).sum(axis=1).max(initial=0))


def without_padding(
    ids: NDArray[Any], logits: NDArray[Any], logsumexp: NDArray[Any], vocab_size: int
) -> tuple[NDArray[Any], NDArray[Any], Padding]:
    """Remove padding ids from ids and logits [A, K]; return both and the counts of padding ids.

    The other entries keep their order; absent entries fill the end of the row.
    """
    padding = (ids >= vocab_size) & (ids < vocab_size + MAX_PADDING)
    if not padding.any():
        return ids, logits, Padding()
    with np.errstate(all="ignore"):  # NaN logits are refused later
        mass = float(np.exp(np.where(padding, logits - logsumexp, -np.inf)).sum())
    order = padding.argsort(axis=1, kind="stable")
    ids, logits = np.where(padding, ABSENT_ID, ids), np.where(padding, -np.inf, logits)
    moved = np.take_along_axis(ids, order, 1), np.take_along_axis(logits, order, 1)
    return *moved, Padding(int(padding.sum()), int(padding.any(axis=1).sum()), mass)
