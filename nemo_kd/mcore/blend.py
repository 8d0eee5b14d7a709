"""The order in which several data sets are drawn from, in proportion to their weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from megatron.core.datasets import helpers_cpp
from numpy.typing import NDArray

FIRST_SIZE = 1024


def blending_indices(
    weights: Sequence[float], size: int
) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """Return the data set of each of `size` draws, and which of that data set's draws it is.

    Megatron-core's function: each draw goes to the data set that is furthest behind its share. The
    first draws do not depend on `size`.
    """
    dataset, number = np.zeros(size, np.int16), np.zeros(size, np.int64)
    shares = np.asarray(weights, dtype=np.float64)
    helpers_cpp.build_blending_indices(
        dataset, number, shares / shares.sum(), len(weights), size, False
    )
    return dataset, number


class EndlessBlend:
    """`blending_indices` without a size: computed for twice as many draws when they run out."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = weights
        self._dataset, self._number = blending_indices(weights, FIRST_SIZE)

    def __getitem__(self, draw: int) -> tuple[int, int]:
        """Return the data set of a draw, and which of that data set's draws it is."""
        if len(self.weights) == 1:
            return 0, draw
        size = len(self._dataset)
        while draw >= size:
            size *= 2
        if size > len(self._dataset):
            self._dataset, self._number = blending_indices(self.weights, size)
        return int(self._dataset[draw]), int(self._number[draw])
