"""Interface of the profiles, which convert a `TopK` to arrays on disk and back.

If a teacher has, or a profile keeps, fewer than K ids, the remaining entries of the row [K] are
*absent*: id -1 and logit -inf, at the end of the row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from nemo_kd.errors import StoreError
from nemo_kd.store.spec import StoreSpec
from nemo_kd.topk import TopK, t1_index

Arrays = dict[str, NDArray[Any]]
MAX_ENTRIES = 1 << 25
"""Entries, answer tokens times K, of a sample in a profile of variable length."""


class Codec(ABC):
    """Encoder and decoder of a profile: `decode(encode(topk), A) = topk` up to a stated error."""

    name: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()
    """The keys of `StoreSpec.profile_options` that the profile accepts."""
    joinable: ClassVar[bool] = True
    """Whether every answer token has the same number of values in each field, so that the joined
    arrays of several samples decode as those of one."""

    def __init__(self, spec: StoreSpec) -> None:
        unknown = sorted(set(spec.profile_options) - set(self.options))
        if unknown:
            known = ", ".join(self.options) or "none"
            raise StoreError(f"profile {self.name} has no option {unknown}; its options: {known}")
        self.spec = spec
        self.temperatures = len(spec.temperatures)
        self.t1 = t1_index(spec.temperatures)

    @property
    @abstractmethod
    def dtypes(self) -> dict[str, type[np.generic]]:
        """Dtype of each field's `.bin` file, in the order of the seal's word sums; at most four."""

    @abstractmethod
    def encode(self, topk: TopK) -> Arrays:
        """Encode a `TopK` as one flat array per field.

        Raises StoreError if the profile cannot represent it.
        """

    @abstractmethod
    def decode(self, arrays: Arrays, answers: int) -> TopK:
        """Decode the `TopK` of A = `answers` tokens; raise ValueError if the arrays do not fit."""

    def topk(self, ids: Any, logits: Any, logsumexp: Any) -> TopK:
        """Build a `TopK` with the spec's temperatures."""
        return TopK(
            ids=ids, logits=logits, logsumexp=logsumexp, temperatures=self.spec.temperatures
        )

    @abstractmethod
    def bytes_per_token(self, kept: float) -> float:
        """Encoded bytes per answer token with `kept` ids, excluding tokens and indices."""


def relative_logits(topk: TopK, t1: int) -> NDArray[np.float32]:
    """Return `z - L` [A, K] float32, clipped to 0: rounding may put a probability above 1."""
    relative: NDArray[np.float32] = topk.logits - topk.logsumexp[:, t1, None]
    return np.minimum(relative, np.float32(0), out=relative)


def check_entries(tokens: int, width: int) -> None:
    """Raise StoreError if the rows [tokens, width] of a sample are too large to be decoded.

    In profiles with as many bytes as kept ids, a small file can stand for many entries.
    """
    if tokens * width > MAX_ENTRIES:
        raise StoreError(
            f"{tokens} answer tokens of up to {width} ids exceed {MAX_ENTRIES} entries per sample"
        )


def check_counts(counts: NDArray[Any], width: int) -> None:
    """Raise ValueError if a row has no entry or more than `width`."""
    if counts.size and (counts.min() < 1 or counts.max() > width):
        raise ValueError(
            f"rows of {counts.min()} to {counts.max()} ids, expected 1 to {width} in each"
        )


def ragged(counts: NDArray[Any], width: int, filler: Any, values: NDArray[Any]) -> NDArray[Any]:
    """Split `values` into rows [A, width]: row a takes the next `counts[a]`, then filler.

    Raises ValueError if a count is outside [1, width], if the counts do not sum to `len(values)`,
    or if the rows are too large.
    """
    check_entries(len(counts), width)
    counts = counts.astype(np.int64)
    check_counts(counts, width)
    if counts.sum() != len(values):
        raise ValueError(f"{len(values)} entries where the counts sum to {counts.sum()}")
    rows = np.full((len(counts), width), filler, values.dtype)
    rows[np.arange(width) < counts[:, None]] = values
    return rows
