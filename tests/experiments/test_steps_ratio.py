"""The steps ratio and its bootstrap, against direct computations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from steps_ratio import Curves, Draws, Interval, difference, first_reached, ratio

STEPS = np.array([20.0, 40.0, 60.0, 80.0])


def curves(values: list[list[list[float]]], tokens: list[float]) -> Curves:
    return Curves(STEPS, np.array(values), np.array(tokens))


def test_the_target_is_reached_on_the_straight_line_between_two_validations() -> None:
    assert first_reached(STEPS, np.array([5.0, 4.0, 3.0, 3.5]), 3.25) == 55.0
    assert first_reached(STEPS, np.array([5.0, 4.0, 3.0, 3.5]), 4.0) == 40.0
    assert first_reached(STEPS, np.array([5.0, 4.0, 3.0, 3.5]), 9.0) == 20.0
    assert math.isinf(first_reached(STEPS, np.array([5.0, 4.0, 3.0, 3.5]), 2.9))
    curves = np.array([[5.0, 4.0, 3.0, 3.5], [9.0, 8.0, 7.0, 1.0], [2.0, 4.0, 1.0, 1.0]])
    reached = first_reached(STEPS, curves, np.array([3.25, 4.0, 1.0]))
    assert reached.tolist() == [55.0, 70.0, 60.0]


def test_ratio_is_to_the_step_of_the_best_and_not_to_the_last() -> None:
    a = curves([[[5.0], [4.0], [3.0], [3.4]]], [10])
    b = curves([[[4.0], [3.0], [2.5], [2.4]]], [10])
    assert ratio(a, b, 10, 0.9, 0).value == 40 / 60
    assert ratio(a, a, 10, 0.9, 0).value == 1.0
    assert math.isinf(ratio(b, a, 10, 0.9, 0).value)


def test_the_best_step_does_not_jump_from_draw_to_draw() -> None:
    """A's two groups are at their best at 40 and at 80, B's both where A is at 80 already at 20."""
    a = curves([[[5, 5], [2, 4], [3, 3], [3, 2]]], [10, 10])
    b = curves([[[3, 2], [2, 1], [1, 1], [1, 1]]], [10, 10])
    assert ratio(a, b, draws=500, level=0.9, seed=0) == Interval(0.25, 0.25, 0.25)


def test_mean_weighs_groups_by_their_tokens_and_seeds_alike() -> None:
    found = curves([[[1, 4], [1, 4], [1, 4], [1, 4]], [[3, 8], [3, 8], [3, 8], [3, 8]]], [30, 10])
    first, second = (30 * 1 + 10 * 4) / 40, (30 * 3 + 10 * 8) / 40
    assert found.mean() == pytest.approx([(first + second) / 2] * 4)
    drawn = Draws(np.array([[0.0, 2.0], [1.0, 1.0]]), np.array([[1.0, 1.0], [0.0, 2.0]]))
    assert found.means(drawn)[0] == pytest.approx([second] * 4)
    assert found.means(drawn)[1] == pytest.approx([6.0] * 4)


def test_interval_of_two_groups_is_that_of_all_equally_likely_draws() -> None:
    """With two groups the draws are {0,0}, {0,1}, {1,0}, {1,1}: differences -1, -0.5, -0.5, 0."""
    a = curves([[[5, 5], [4, 4], [3, 3], [2, 2]]], [10, 10])
    b = curves([[[5, 5], [4, 4], [3, 3], [1, 2]]], [10, 10])
    wide = difference(a, b, draws=2000, level=0.9, seed=0)
    narrow = difference(a, b, draws=2000, level=0.4, seed=0)
    assert (wide.value, wide.low, wide.high) == (-0.5, -1.0, 0.0)
    assert (narrow.low, narrow.high) == (-0.5, -0.5)


def test_interval_says_never_where_draws_do_not_reach_the_target() -> None:
    """Group 1 never gets as good: a quarter of the draws have it alone."""
    a = curves([[[5, 5], [4, 4], [3, 3], [2, 2]]], [10, 10])
    b = curves([[[2, 6], [1, 6], [0, 6], [-4, 6]]], [10, 10])
    found = ratio(a, b, draws=2000, level=0.9, seed=0)
    assert found.value == first_reached(STEPS, b.mean(), 2.0) / 80 == 70 / 80
    assert found.low == 0.25
    assert math.isinf(found.high)


def test_draws_are_the_same_for_both_curves() -> None:
    """What groups and seeds have in common cancels: equal curves differ by exactly nothing."""
    random = np.random.default_rng(5)
    a = Curves(STEPS, random.random((3, 4, 7)), random.integers(1, 99, 7).astype(float))
    found = difference(a, a, draws=300, level=0.9, seed=1)
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)
    shifted = Curves(STEPS, a.values - 0.25, a.tokens)
    assert difference(a, shifted, 300, 0.9, 1).low == pytest.approx(-0.25)
