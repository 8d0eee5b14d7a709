"""Random numbers that depend on nothing but a seed and a row, on any machine.

The output function of splitmix64 (Steele et al. 2014) on 64-bit counters.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio


def mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's bijection of 64-bit integers, elementwise; products wrap."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def unit(x: NDArray[np.uint64]) -> NDArray[np.float64]:
    """`mixed(x)` as numbers in [0, 1), of its 53 high bits."""
    return (mixed(x) >> np.uint64(11)) / float(1 << 53)


def counter(*values: int) -> NDArray[np.uint64]:
    """[len(values)]: integers modulo 2^64."""
    return np.array([value % (1 << 64) for value in values], dtype=np.uint64)
