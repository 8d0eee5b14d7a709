"""The fraction of steps that distillation needs, with a bootstrap interval.

    ratio = (first step at which B is as good as A at its best step) / (A's best step)

A's best step is that of its mean curve over all seeds and groups. It is the same in every draw of
the bootstrap: between steps of nearly the same loss it would jump from draw to draw, and the
interval would show these jumps. B's curve is taken as straight between two validations. Intervals
are percentiles of a bootstrap that draws the groups of the test split and the seeds, both with
replacement and the same for A and B. A group is some whole modules: samples of one module are
alike, and are drawn together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Curves:
    """Held-out losses of the seeds of one setting."""

    steps: Array
    """[P], ascending"""
    values: Array
    """[seeds, P, groups], nats per token"""
    tokens: Array
    """[groups], answer tokens"""

    def mean(self, seeds: NDArray[np.intp] | None = None, groups: Array | None = None) -> Array:
        """The mean loss [P] over seeds and tokens; `groups` [groups] counts the draws of each."""
        weights = self.tokens if groups is None else self.tokens * groups
        values = self.values if seeds is None else self.values[seeds]
        mean: Array = (values @ weights).mean(axis=0) / weights.sum()
        return mean

    @property
    def best(self) -> int:
        """Where in `steps` the mean loss is lowest."""
        return int(self.mean().argmin())


@dataclass(frozen=True)
class Interval:
    """A value with its bootstrap interval."""

    value: float
    low: float
    high: float


def first_reached(steps: Array, curve: Array, target: float) -> float:
    """The first step at which a curve is at or below the target; inf if it never is.

    At the first point where that is already below: an upper bound.
    """
    below = np.flatnonzero(curve <= target)
    if not len(below):
        return float("inf")
    i = int(below[0])
    if i == 0:
        return float(steps[0])
    share = (curve[i - 1] - target) / (curve[i - 1] - curve[i])
    return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))


def ratio(a: Curves, b: Curves, draws: int, level: float, seed: int) -> Interval:
    """The steps ratio of the mean curves, with its interval; inf where B does not get there."""
    best = a.best

    def statistic(seeds: NDArray[np.intp] | None, groups: Array | None) -> float:
        target = float(a.mean(seeds, groups)[best])
        return first_reached(b.steps, b.mean(seeds, groups), target) / float(a.steps[best])

    return bootstrap(statistic, a, draws, level, seed)


def difference(
    a: Curves, b: Curves, draws: int, level: float, seed: int, step: int | None = None
) -> Interval:
    """B's loss minus A's at the last or another step of both, with its interval."""
    at_a, at_b = (-1 if step is None else int(np.searchsorted(x.steps, step)) for x in (a, b))

    def statistic(seeds: NDArray[np.intp] | None, groups: Array | None) -> float:
        return float(b.mean(seeds, groups)[at_b] - a.mean(seeds, groups)[at_a])

    return bootstrap(statistic, a, draws, level, seed)


def bootstrap(
    statistic: Callable[[NDArray[np.intp] | None, Array | None], float],
    like: Curves,
    draws: int,
    level: float,
    seed: int,
) -> Interval:
    """`statistic(None, None)` with bootstrap percentiles over the seeds and groups of `like`."""
    random = np.random.default_rng(seed)
    seeds, groups = len(like.values), len(like.tokens)
    values = [
        statistic(
            random.integers(seeds, size=seeds),
            np.bincount(random.integers(groups, size=groups), minlength=groups).astype(float),
        )
        for _ in range(draws)
    ]
    # Without interpolation: a draw may be inf.
    margin = (1 - level) / 2
    low, high = np.quantile(values, [margin, 1 - margin], method="inverted_cdf")
    return Interval(statistic(None, None), float(low), float(high))
