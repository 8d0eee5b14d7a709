"""Elias–Fano coded ids and 6 to 8-bit log-probabilities: a fixed number of bytes per token.

At most 250 bytes for K = 100 and any vocabulary up to 262,144. A record, in bits:

    16         float16 of log(1 - mass), where mass is the total probability of the K ids
    16         float16 of R = max_i z_i - min_i z_i; its sign bit is set if ids are absent
    K * l      the low l bits of each id, ids ascending; l = floor(log2(V / K))
    K * c      the level of each id, in the same order
    m * 2      two additional level bits for the m = floor(K / 5) ids with the lowest levels
    K + H      bit i + (id_i >> l) is set for the i-th id; H = (V - 1) >> l

where c is the largest of 8, 7, 6 whose record has at most 2.5 K bytes, else 6. The level is
`floor(2^c * ((max z - z) / R)^(2/3))`: steps are finer for more probable ids. The additional bits
are in order of ascending level, then ascending id. The decoder sets each id to the middle of its
step and scales the ids to `mass`, so that the tail beyond K has float16 accuracy. KL(stored ||
true) over the K ids and the tail is below 1e-4 nats on average (measured in docs/store.md).

Absent entries get the highest level. To keep present ids below it, R is then enlarged by
`(2^c / (2^c - 1))^(3/2)`. Ids whose probability is 0 in float32, such as those that a teacher masks
with a logit of -1e9, are stored as absent: steps that reach their logits would be too coarse.

The log-sum-exp at T = 1 decodes as 0; the others are stored as float32, relative to it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_kd.store.codecs.base import Arrays, Codec, relative_logits
from nemo_kd.store.codecs.bits import SPARE, get, get_unary, put, put_unary
from nemo_kd.store.spec import StoreSpec
from nemo_kd.topk import ABSENT_ID, TopK

FINER_SHARE = 5  # one id in five gets a finer level
FINER_BITS = 2
BYTES_PER_ID = 2.5
LEAST = np.float32(-104)
"""Log-probability whose exponential is 0 in float32."""
_HALVES = 32  # bits of the two leading float16 numbers


class Compact(Codec):
    name = "compact"

    def __init__(self, spec: StoreSpec) -> None:
        super().__init__(spec)
        self.k, self.finer = spec.top_k, spec.top_k // FINER_SHARE
        self.low_bits = (spec.vocab_size // spec.top_k).bit_length() - 1
        self.max_high = (spec.vocab_size - 1) >> self.low_bits
        fits = [c for c in (8, 7) if self._bytes(c) <= BYTES_PER_ID * self.k]
        self.level_bits = max(fits, default=6)
        self.highest = (1 << self.level_bits) - 1
        self.record_bytes = self._bytes(self.level_bits)
        self.levels_at = _HALVES + self.k * self.low_bits
        self.finer_at = self.levels_at + self.k * self.level_bits
        self.high_at = self.finer_at + self.finer * FINER_BITS
        # The decoder counts in half finest steps, so that the middle of any step is an integer.
        self.unit_bits = self.level_bits + FINER_BITS + 1
        self.id_bits = (spec.vocab_size - 1).bit_length()
        narrow = self.unit_bits + self.id_bits <= 32
        self.dtype: np.dtype[Any] = np.dtype(np.uint32 if narrow else np.uint64)

    def _bytes(self, level_bits: int) -> int:
        bits = _HALVES + self.k * (self.low_bits + level_bits) + self.finer * FINER_BITS
        return -(-(bits + self.k + self.max_high) // 8)

    @property
    def dtypes(self) -> dict[str, type[np.generic]]:
        return {"records": np.uint8, "lse": np.float32}

    def encode(self, topk: TopK) -> Arrays:
        relative = relative_logits(topk, self.t1)
        levels, ranges = self._finest_levels(relative)
        ids = np.maximum(topk.ids, 0)  # the encoded id of an absent entry is arbitrary
        ids, levels = sort_pairs(ids, levels, self.level_bits + FINER_BITS)
        coarse = levels >> FINER_BITS
        # No two entries share level and id, so the finer bits never decide the order.
        by_level = coarse << self.id_bits | ids
        _, finer = sort_pairs(by_level, levels & ((1 << FINER_BITS) - 1), FINER_BITS)
        bits = np.zeros((len(ids), self.record_bytes * 8), np.uint8)
        halves = np.stack([_log_rest(relative), ranges], axis=1).astype(np.float16)
        put(bits, 0, 16, halves.view(np.uint16))
        put(bits, _HALVES, self.low_bits, ids)
        put(bits, self.levels_at, self.level_bits, coarse)
        put(bits, self.finer_at, FINER_BITS, finer[:, : self.finer])
        put_unary(bits, self.high_at, ids >> self.low_bits)
        return {
            "records": np.packbits(bits, axis=1, bitorder="little").ravel(),
            "lse": self._relative_logsumexp(topk.logsumexp).ravel(),
        }

    def decode(self, arrays: Arrays, answers: int) -> TopK:
        size = answers * self.record_bytes
        if len(arrays["records"]) != size:
            raise ValueError(f"{len(arrays['records'])} bytes of records, expected {size}")
        padded = np.concatenate([arrays["records"], np.zeros(SPARE, np.uint8)])
        records = padded[:size].reshape(answers, self.record_bytes)
        high = get_unary(records, self.high_at, self.k, self.max_high)
        low = self._get(padded, _HALVES, self.low_bits, self.k)
        ids = high.astype(self.dtype) << self.dtype.type(self.low_bits) | low
        units, ids = self._units(padded, ids)
        halves = np.ascontiguousarray(records[:, : _HALVES // 8]).view("<f2").astype(np.float32)
        ids, absent = ids.astype(np.int64), None
        if np.signbit(halves[:, 1]).any():
            absent = np.signbit(halves[:, 1:]) & (units >> (FINER_BITS + 1) == self.highest)
            ids[absent] = ABSENT_ID
        logits = self._log_probabilities(units, halves[:, :1], np.abs(halves[:, 1:]), absent)
        logsumexp = np.zeros((answers, self.temperatures), np.float32)
        others = [j for j in range(self.temperatures) if j != self.t1]
        logsumexp[:, others] = arrays["lse"].reshape(answers, len(others))
        return self.topk(ids, logits, logsumexp)

    def bytes_per_token(self, kept: float) -> float:
        return self.record_bytes + 4 * (self.temperatures - 1)

    def _finest_levels(
        self, relative: NDArray[np.float32]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return levels of c + 2 bits [A, K] and R [A], rounded to float16.

        R is negative in rows with absent ids.
        """
        absent = relative < LEAST
        below = np.where(absent, 0, relative.max(axis=1, keepdims=True) - relative)
        some = absent.any(axis=1)
        ranges = below.max(axis=1, initial=0)
        ranges[some] *= (1 + 1 / self.highest) ** 1.5
        ranges = ranges.astype(np.float16).astype(np.float32)
        share = below / np.maximum(ranges, np.finfo(np.float32).tiny)[:, None]
        steps = 1 << (self.level_bits + FINER_BITS)
        levels = np.cbrt(share * share) * np.float32(steps)
        last = np.where(some, self.highest << FINER_BITS, steps)[:, None] - 1
        levels = np.where(absent, steps - 1, np.minimum(levels, last.astype(np.float32)))
        return levels.astype(np.int64), np.where(some, -ranges, ranges)

    def _units(
        self, padded: NDArray[np.uint8], ids: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return levels, in half finest steps, and ids [A, K], sorted by level, then by id."""
        one, middle = self.dtype.type(1), self.dtype.type(1 << FINER_BITS)
        coarse = self._get(padded, self.levels_at, self.level_bits, self.k)
        coarse, ids = sort_pairs(coarse, ids, self.id_bits)
        units = (coarse << self.dtype.type(FINER_BITS + 1)) + middle
        finer = self._get(padded, self.finer_at, FINER_BITS, self.finer)
        units[:, : self.finer] += finer + finer + one - middle
        # Finer bits can move only entries up to the last one on the last finer entry's level.
        end = self.finer
        while 0 < end < self.k and (coarse[:, end] == coarse[:, self.finer - 1]).any():
            end += 1
        units[:, :end], ids[:, :end] = sort_pairs(units[:, :end], ids[:, :end], self.id_bits)
        return units, ids

    def _log_probabilities(
        self,
        units: NDArray[Any],
        log_rest: NDArray[np.float32],
        ranges: NDArray[np.float32],
        absent: NDArray[np.bool_] | None,
    ) -> NDArray[np.float32]:
        """Return log-probabilities [A, K] from `max z - z = R u^(3/2)`, scaled to the mass.

        u is the level in [0, 1); entries that are `absent` become -inf.
        """
        u = units.astype(np.float32) * np.float32(0.5**self.unit_bits)
        logits: NDArray[np.float32] = u * np.sqrt(u) * -ranges
        if absent is not None:
            logits[absent] = -np.inf
        logits += np.log1p(-np.exp(log_rest)) - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return logits

    def _relative_logsumexp(self, logsumexp: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the log-sum-exp of the log-probabilities, `L_T - L / T` [A, T - 1], for T != 1."""
        unit = logsumexp[:, self.t1, None]
        relative = logsumexp - unit / np.array(self.spec.temperatures, np.float32)
        return np.delete(relative, self.t1, axis=1)

    def _get(self, padded: NDArray[np.uint8], offset: int, width: int, count: int) -> NDArray[Any]:
        fields = get(padded, self.record_bytes, offset, width, count)
        return fields.astype(self.dtype, copy=False)


def sort_pairs(
    major: NDArray[Any], minor: NDArray[Any], minor_bits: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Sort each row of both arrays by (major, minor), with a single sort and no index array.

    The arrays are integers of one dtype, wide enough for the combined bits of both.
    """
    shift = major.dtype.type(minor_bits)
    joined = major << shift | minor
    joined.sort(axis=1)
    return joined >> shift, joined & major.dtype.type((1 << minor_bits) - 1)


def _log_rest(relative: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return log(1 - Σ_i exp(z_i - L)) [A]; -inf where rounding makes the difference <= 0."""
    rest = 1 - np.exp(relative, dtype=np.float64).sum(axis=1)
    logs = np.full(len(rest), -np.inf, np.float32)
    np.log(rest, out=logs, where=rest > 0, casting="same_kind")
    return logs
