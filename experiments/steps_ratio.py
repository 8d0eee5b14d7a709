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
class Draws:
    """How often each draw of a bootstrap has each seed and each group."""

    seeds: Array
    """[draws, seeds]"""
    groups: Array
    """[draws, groups]"""

    @classmethod
    def of(cls, like: Curves, draws: int, seed: int) -> Draws:
        """Draw the seeds and groups of `like` with replacement."""
        random = np.random.default_rng(seed)

        def counts(size: int) -> Array:
            return np.bincount(random.integers(size, size=size), minlength=size).astype(float)

        seeds, groups = len(like.values), len(like.tokens)
        drawn = [(counts(seeds), counts(groups)) for _ in range(draws)]
        return cls(*map(np.array, zip(*drawn, strict=True)))


@dataclass(frozen=True)
class Curves:
    """Held-out losses of the seeds of one setting."""

    steps: Array
    """[P], ascending"""
    values: Array
    """[seeds, P, groups], nats per token"""
    tokens: Array
    """[groups], answer tokens"""

    def mean(self) -> Array:
        """The mean loss [P] over seeds and tokens."""
        mean: Array = (self.values @ self.tokens).mean(axis=0) / self.tokens.sum()
        return mean

    def means(self, drawn: Draws) -> Array:
        """The mean losses [draws, P] over the seeds and groups of each draw."""
        weights = self.tokens * drawn.groups  # [draws, groups]
        sums = self.values @ weights.T  # [seeds, P, draws]
        means: Array = np.einsum("ds,spd->dp", drawn.seeds, sums) / len(self.values)
        return means / weights.sum(axis=1, keepdims=True)

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


def first_reached(steps: Array, curves: Array, targets: Array | float) -> Array:
    """The first steps at which curves [..., P] are at or below targets [...]; inf without one.

    Of a curve that is below at its first point: that point, an upper bound.
    """
    targets = np.asarray(targets)[..., None]
    below = curves <= targets
    at = below.argmax(axis=-1, keepdims=True)  # of the first
    before = np.maximum(at - 1, 0)
    high, low = (np.take_along_axis(curves, where, axis=-1) for where in (before, at))
    share = np.divide(high - targets, high - low, out=np.zeros_like(high), where=at > 0)
    reached = steps[before] + share * (steps[at] - steps[before])
    return np.where(below.any(axis=-1), reached[..., 0], np.inf)


def ratio(a: Curves, b: Curves, draws: int, level: float, seed: int) -> Interval:
    """The steps ratio of the mean curves, with its interval; inf where B does not get there."""
    best = a.best

    def statistic(first: Array, second: Array) -> Array:
        return first_reached(b.steps, second, first[..., best]) / a.steps[best]

    return bootstrap(statistic, a, b, draws, level, seed)


def difference(
    a: Curves, b: Curves, draws: int, level: float, seed: int, step: int | None = None
) -> Interval:
    """B's loss minus A's at the last or another step of both, with its interval."""
    at_a, at_b = (-1 if step is None else int(np.searchsorted(x.steps, step)) for x in (a, b))

    def statistic(first: Array, second: Array) -> Array:
        return second[..., at_b] - first[..., at_a]

    return bootstrap(statistic, a, b, draws, level, seed)


def bootstrap(
    statistic: Callable[[Array, Array], Array],
    a: Curves,
    b: Curves,
    draws: int,
    level: float,
    seed: int,
) -> Interval:
    """`statistic` of the mean curves [..., P] of A and B, with bootstrap percentiles."""
    drawn = Draws.of(a, draws, seed)
    values = statistic(a.means(drawn), b.means(drawn))
    # Without interpolation: a draw may be inf.
    margin = (1 - level) / 2
    low, high = np.quantile(values, [margin, 1 - margin], method="inverted_cdf")
    return Interval(float(statistic(a.mean(), b.mean())), float(low), float(high))
