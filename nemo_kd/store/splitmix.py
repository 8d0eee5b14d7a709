"""Random numbers that depend only on a seed and a row number, identical on every machine.

The output function of splitmix64 (Steele et al. 2014) on 64-bit counters.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio


def mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply splitmix64's bijection of 64-bit integers elementwise, modulo 2^64."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def unit(x: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Convert the 53 high bits of `mixed(x)` to float64 numbers in [0, 1)."""
    return (mixed(x) >> np.uint64(11)) / float(1 << 53)


def counter(*values: int) -> NDArray[np.uint64]:
    """Return the integers modulo 2^64 as an array [len(values)]."""
    return np.array([value % (1 << 64) for value in values], dtype=np.uint64)
