"""Group samples into packs of a bounded size: first-fit-decreasing, or consecutive samples.

First-fit-decreasing: longest first, each sample goes into the first pack that has room for it.
All samples of one length are placed in a single pass over the packs, not one pass per sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nemo_kd.data.lengths import Fitting
from nemo_kd.errors import NemoKDError
from nemo_kd.store import Store


@dataclass(frozen=True)
class Packs:
    """The samples of each pack: pack p has `members[bounds[p] : bounds[p + 1]]`."""

    members: NDArray[np.int64]
    """[samples]: each index once."""

    bounds: NDArray[np.int64]
    """[packs + 1]"""

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, pack: int) -> NDArray[np.int64]:
        return self.members[self.bounds[pack] : self.bounds[pack + 1]]


def first_fit_decreasing(lengths: ArrayLike, size: int, seed: int = 0) -> Packs:
    """Packs whose lengths sum to at most `size`; lengths [samples] are integers from 0 to `size`.

    At most 11/9 of the minimal number of packs, plus two thirds of one. `seed` shuffles samples of
    the same length; the lengths in each pack do not depend on it.

    Errors: NemoKDError for a length that is below 0 or above `size`.
    """
    sizes = _checked(lengths, size)
    shuffled = np.random.default_rng(seed).permutation(len(sizes))
    order = shuffled[np.argsort(-sizes[shuffled], kind="stable")]  # longest first
    pack_of = _first_fit(sizes[order], size)
    by_pack = np.argsort(pack_of, kind="stable")
    counts = np.bincount(pack_of)
    return Packs(order[by_pack], np.concatenate([[0], counts.cumsum()]))


@dataclass(frozen=True)
class Packing(Fitting):
    """The used samples of a store in packs; `packs` holds indices into `used`."""

    packs: Packs
    max_seq_length: int
    inputs: int
    """Inputs in all packs: a sample of L tokens has L - 1, since its last token is only a label."""

    def __len__(self) -> int:
        return len(self.packs)

    def __str__(self) -> str:
        full = self.inputs / (len(self) * self.max_seq_length)
        return (
            f"{len(self.used)} samples in {len(self)} packs of max_seq_length="
            f"{self.max_seq_length} tokens, {len(self.used) / len(self):.1f} samples per pack, "
            f"{full:.1%} full"
        )


def in_order(lengths: ArrayLike, size: int) -> Packs:
    """Packs of consecutive samples that sum to at most `size`; lengths [samples] >= 0.

    Errors: NemoKDError for a length above `size`.
    """
    sizes = _checked(lengths, size)
    ends = np.concatenate([[0], sizes.cumsum()])  # [samples + 1]
    bounds = [0]
    while bounds[-1] < len(sizes):
        full = ends[bounds[-1]] + size
        bounds.append(int(np.searchsorted(ends, full, side="right")) - 1)
    return Packs(np.arange(len(sizes)), np.array(bounds))


def pack_samples(
    store: Store,
    fitting: Fitting,
    max_seq_length: int,
    seed: int | None = 0,
    longest: int | None = None,
) -> Packing:
    """The samples that `fit_lengths` found, in packs of at most `max_seq_length` inputs.

    `longest`: number of tokens that a sample is truncated to; None: `max_seq_length`. `seed`: as
    in `first_fit_decreasing`; None keeps the samples in the store's order, which fills
    the packs less.
    """
    lengths = np.minimum(store.lengths[fitting.used], longest or max_seq_length) - 1
    if seed is None:
        packs = in_order(lengths, max_seq_length)
    else:
        packs = first_fit_decreasing(lengths, max_seq_length, seed)
    return Packing(
        fitting.used, fitting.truncated, fitting.dropped, packs, max_seq_length, int(lengths.sum())
    )


def _checked(lengths: ArrayLike, size: int) -> NDArray[np.int64]:
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and not 0 <= sizes.min() <= sizes.max() <= size:
        raise NemoKDError(
            f"lengths from {sizes.min()} to {sizes.max()} do not fit packs of {size}: each must "
            f"be in [0, {size}]"
        )
    return sizes


def _first_fit(sizes: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Return the pack of each sample [samples], given sizes in descending order."""
    room = np.full(len(sizes), size)  # of each pack, opened or not
    opened = 0
    pack_of = [np.empty(0, dtype=np.int64)]
    values, counts = np.unique(-sizes, return_counts=True)
    for length, count in zip(-values, counts, strict=True):
        # The packs with room, then enough new ones for all samples.
        new = -(-count // (size // length)) if length else 1
        packs = np.append(np.flatnonzero(room[:opened] >= length), np.arange(opened, opened + new))
        packs = packs[:count]
        fitting = room[packs] // length if length else np.full(len(packs), count)
        before = np.cumsum(fitting) - fitting
        taken = np.clip(count - before, 0, fitting)  # first fit: in the order of the packs
        room[packs] -= taken * length
        pack_of.append(np.repeat(packs, taken))
        opened = max(opened, int(pack_of[-1].max(initial=-1)) + 1)
    return np.concatenate(pack_of)
