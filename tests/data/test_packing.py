"""Packing: nothing lost, nothing over the size, and the very packs of first-fit-decreasing."""

from __future__ import annotations

import time
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_kd.data import first_fit_decreasing
from nemo_kd.data.packing import in_order

problems = st.integers(1, 40).flatmap(
    lambda size: st.tuples(st.lists(st.integers(0, size), max_size=60), st.just(size))
)
small = st.integers(1, 12).flatmap(
    lambda size: st.tuples(st.lists(st.integers(1, size), min_size=1, max_size=8), st.just(size))
)


def plainly(lengths: list[int], size: int) -> list[list[int]]:
    """The lengths in each pack: the definition, one sample after the other."""
    packs: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fits = (pack for pack in packs if sum(pack) + length <= size)
        pack = next(fits, None)
        if pack is None:
            packs.append(pack := [])
        pack.append(length)
    return packs


def fewest(lengths: list[int], size: int) -> int:
    """The fewest packs possible, by trying all."""

    def fits(rest: list[int], rooms: list[int]) -> bool:
        if not rest:
            return True
        return any(
            fits(rest[1:], [*rooms[:i], room - rest[0], *rooms[i + 1 :]])
            for i, room in enumerate(rooms)
            if room >= rest[0]
        )

    falling = sorted(lengths, reverse=True)
    return next(packs for packs in count(1) if fits(falling, [size] * packs))


@settings(deadline=None)
@given(problem=problems, seed=st.integers(0, 3))
def test_packs_are_those_of_the_plain_algorithm(problem: tuple[list[int], int], seed: int) -> None:
    lengths, size = problem
    packs = first_fit_decreasing(lengths, size, seed)
    assert sorted(packs.members.tolist()) == list(range(len(lengths)))  # each sample once
    found = [[lengths[i] for i in packs[p]] for p in range(len(packs))]
    assert all(sum(pack) <= size for pack in found)
    assert found == plainly(lengths, size)


@settings(deadline=None)
@given(problem=small)
def test_at_most_eleven_ninths_of_the_fewest_packs(problem: tuple[list[int], int]) -> None:
    lengths, size = problem
    assert len(first_fit_decreasing(lengths, size)) <= (11 * fewest(lengths, size) + 6) / 9


def test_the_seed_decides_which_of_the_same_length_are_together() -> None:
    lengths = np.random.default_rng(0).integers(1, 20, 500)

    def members(seed: int) -> list[list[int]]:
        packs = first_fit_decreasing(lengths, 64, seed)
        return [packs[p].tolist() for p in range(len(packs))]

    assert members(1) == members(1) != members(2)


@pytest.mark.parametrize("lengths", [[3, 9], [-1, 3]])
def test_a_length_that_fits_no_pack_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"do not fit packs of 8: each must be in \[0, 8\]"):
        first_fit_decreasing(lengths, 8)


def test_a_hundred_thousand_samples_take_a_second() -> None:
    """0.1 s on the machine it was written on; the plain algorithm takes minutes."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(6, 0.8, 100_000).astype(int) + 1, 4096)
    start = time.perf_counter()
    packs = first_fit_decreasing(lengths, 4096)
    assert time.perf_counter() - start < 2
    assert lengths.sum() / (4096 * len(packs)) > 0.99


@given(problems)
def test_packs_in_order_are_consecutive_and_full(problem: tuple[list[int], int]) -> None:
    """Each sample once, in order; the next one would not have had room."""
    lengths, size = problem
    packs = [list(pack) for pack in in_order(lengths, size)]  # type: ignore[attr-defined]
    assert [place for pack in packs for place in pack] == list(range(len(lengths)))
    sums = [sum(lengths[place] for place in pack) for pack in packs]
    assert all(pack for pack in packs) and all(total <= size for total in sums)
    for total, following in zip(sums, packs[1:], strict=False):
        assert total + lengths[following[0]] > size


def test_a_sample_that_fits_no_pack_is_refused_in_order_too() -> None:
    with pytest.raises(ValueError, match="do not fit packs of 4"):
        in_order([3, 5], 4)
