"""K draws from the teacher's full distribution, stored as distinct ids and their counts.

    p_hat(v) = count_v / K,   E[p_hat(v)] = p(v)

After *Sparse Logit Sampling* (Anshumann et al. 2025, arXiv 2503.16870): a top-K distribution is
biased; draws are unbiased, and so is the gradient of a forward KL, which is linear in the teacher's
probabilities. `top_k` is the number of draws. The `TopK` has logits `log(count / K)` and
log-sum-exp 0; entries beyond the distinct ids are absent.

A tokenizer gives small ids to frequent tokens, and most ids are drawn once, so an id takes as many
octal digits as it has and a count a variable number of bits. A sample is one bit string, zeros up
to a full byte at its end; its D ids are in the order of tokens, those of a token ascending. With V
the size of the vocabulary and B the number of digits of V - 1:

    A * B + D       for each of the A tokens and d = 1 ... B: a 1 for each id of d octal digits,
                    then a 0
    Σ (n + 1)       floor(log2 count) = n zeros, then a 1, for each id but the first of its token
    Σ (w + n)       for each id: its w = min(3 d, bits of V - 1) bits, then the n bits of
                    count - 2^n, none for the first of its token: the counts of a token add up to K
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_kd.errors import StoreError
from nemo_kd.store.codecs.base import Arrays, Codec, check_counts, check_entries, ragged
from nemo_kd.store.codecs.bits import field_bits, read_fields
from nemo_kd.store.spec import StoreSpec
from nemo_kd.topk import ABSENT_ID, TopK

MAX_DRAWS = 255
DIGIT_BITS = 3
EARLIER_FIELDS = ("distinct", "entries")
"""The fields of the encoding before format version 3, which is not read."""
# For `bytes_per_token`: an id's mean bits as a share of those of V - 1, and the growth of a count's
# bits with the mean count. With the distinct ids of SmolLM2-135M on Python they give the measured
# bytes of 6 to 100 draws (6.4 to 45.8) within 5 %.
ID_SHARE = 0.75
COUNT_GROWTH = 0.59


class Sampled(Codec):
    name = "sampled"
    options = ("seed",)
    joinable = False

    def __init__(self, spec: StoreSpec) -> None:
        super().__init__(spec)
        if spec.top_k > MAX_DRAWS:
            raise StoreError(
                f"profile sampled has at most {MAX_DRAWS} draws per token, but top_k is "
                f"{spec.top_k}"
            )
        if spec.temperatures != (1.0,):
            raise StoreError(
                "profile sampled holds draws at temperature 1.0 only; leave temperatures at [1.0], "
                f"not {list(spec.temperatures)}"
            )
        self.id_bits = (spec.vocab_size - 1).bit_length()
        self.max_digits = max(1, -(-self.id_bits // DIGIT_BITS))
        bits = DIGIT_BITS * np.arange(self.max_digits + 1)
        self.smallest = np.int64(1) << bits  # at d - 1: the smallest id of d digits, d > 1
        self.widths = np.minimum(bits, self.id_bits)  # of an id of d digits
        self.log2 = np.frexp(np.arange(spec.top_k + 1))[1].astype(np.int64) - 1  # of a count >= 1

    @property
    def dtypes(self) -> dict[str, type[np.generic]]:
        return {"records": np.uint8}

    def encode(self, topk: TopK) -> Arrays:
        draws, answers = self.spec.top_k, len(topk.ids)
        check_entries(answers, max(draws, self.max_digits))
        shares = np.exp(np.minimum(topk.logits, 0), dtype=np.float64)
        drawn = np.rint(shares * draws).astype(np.int64)
        if (drawn.sum(axis=1) != draws).any() or topk.logsumexp.any():
            raise StoreError(
                f"profile sampled needs the counts of {draws} draws, as logits "
                f"log(count / {draws}) with log-sum-exp 0; a top-K cannot be converted to draws"
            )
        present = drawn > 0
        token = np.repeat(np.arange(answers), present.sum(axis=1))
        ids, counts = self._ascending(token, topk.ids[present], drawn[present])
        same = np.flatnonzero(np.diff(token << self.id_bits | ids) == 0)
        if same.size:
            raise StoreError(f"answer token {token[same[0]]}: the id {ids[same[0]]} twice")
        digits = 1 + np.searchsorted(self.smallest[1:-1], ids, side="right")
        lengths = np.zeros(answers * self.max_digits + len(ids), np.uint8)
        lengths[token * self.max_digits + digits - 1 + np.arange(len(ids))] = 1
        later = np.zeros(len(ids), np.bool_)  # all but the first id of each token
        later[1:] = token[1:] == token[:-1]
        n = np.where(later, self.log2[counts], 0)
        ends = (n[later] + 1).cumsum()
        exponents = np.zeros(ends[-1] if len(ends) else 0, np.uint8)
        exponents[ends - 1] = 1
        widths = self.widths[digits]
        rest = np.where(later, counts - (1 << n), 0)
        fields = field_bits(ids | rest << widths, widths + n)
        bits = np.concatenate([lengths, exponents, fields])
        return {"records": np.packbits(bits, bitorder="little")}

    def decode(self, arrays: Arrays, answers: int) -> TopK:
        draws, records = self.spec.top_k, arrays["records"]
        self._check_size(len(records), answers)
        bits = np.unpackbits(records, bitorder="little")
        of_length = self._of_length(bits, answers)
        distinct = of_length.sum(axis=1)
        check_counts(distinct, draws)
        token = np.repeat(np.arange(answers), distinct)
        digits = np.repeat(np.tile(np.arange(self.max_digits) + 1, answers), of_length.ravel())
        firsts = distinct.cumsum() - distinct
        n, start = self._count_bits(bits, of_length.size + len(token), firsts, len(token))
        widths = self.widths[digits]
        values = read_fields(records, start, widths + n)
        ids, counts = values & ((1 << widths) - 1), (values >> widths) + (1 << n)
        if answers:
            counts[firsts] += draws - np.add.reduceat(counts, firsts)
        if counts.min(initial=1) < 1 or ids.max(initial=0) >= self.spec.vocab_size:
            raise ValueError(f"a token of more than {draws} draws, or an id beyond the vocabulary")
        padded = (ids < self.smallest[digits - 1]) & (digits > 1)
        if padded.any() or (np.diff(token << self.id_bits | ids) <= 0).any():
            raise ValueError("ids that do not ascend, or start with a digit 0")
        # By falling count, then by id: one sort of numbers that contain both.
        keys = (token * draws + draws - counts) << self.id_bits | ids
        keys.sort()
        ids = keys & ((1 << self.id_bits) - 1)
        counts = (token + 1) * draws - (keys >> self.id_bits)
        return TopK(
            ids=ragged(distinct, draws, ABSENT_ID, ids),
            logits=log_frequency(ragged(distinct, draws, 0, counts), draws),
            logsumexp=np.zeros((answers, 1), np.float32),
            draws=True,
        )

    def bytes_per_token(self, kept: float) -> float:
        """An estimate: the bytes depend on which ids are kept, and how often each was drawn."""
        ids = self.max_digits + kept * (1 + ID_SHARE * self.id_bits)
        counts = (kept - 1) * (1 + COUNT_GROWTH * math.log2(self.spec.top_k / kept))
        return (ids + counts) / 8

    def _check_size(self, octets: int, answers: int) -> None:
        """Refuse what would take much more memory than a sample's rows."""
        draws = self.spec.top_k
        check_entries(answers, max(draws, self.max_digits))
        count_bits = 2 * int(self.log2[-1]) + 1
        if octets > 1 + answers * (self.max_digits + draws * (1 + self.id_bits + count_bits)) // 8:
            raise ValueError(f"{octets} bytes are too many for {answers} tokens")

    def _ascending(
        self, token: NDArray[np.int64], ids: NDArray[np.int64], counts: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return ids and counts by token, then id: one sort of numbers that contain all three."""
        shift = self.spec.top_k.bit_length()
        keys = (token << self.id_bits | ids) << shift | counts
        keys.sort()
        return keys >> shift & ((1 << self.id_bits) - 1), keys & ((1 << shift) - 1)

    def _of_length(self, bits: NDArray[np.uint8], answers: int) -> NDArray[np.int64]:
        """Return the number of ids of each length for each token [A, B]."""
        size = answers * self.max_digits
        zeros = np.flatnonzero(bits[: size + answers * self.spec.top_k] == 0)[:size]
        if len(zeros) < size:
            raise ValueError(f"{len(bits)} bits do not have the ids of {answers} tokens")
        return np.diff(zeros - np.arange(size), prepend=0).reshape(answers, self.max_digits)

    def _count_bits(
        self, bits: NDArray[np.uint8], start: int, firsts: NDArray[np.int64], ids: int
    ) -> tuple[NDArray[np.int64], int]:
        """Return n = floor(log2 count) of each id, 0 for the first of a token, and where they end.

        `start` is where they begin in `bits`, `firsts` the indices of each token's first id.
        """
        later = np.ones(ids, np.bool_)
        later[firsts] = False
        coded = ids - len(firsts)
        n, ends = np.zeros(ids, np.int64), np.zeros(0, np.int64)
        for mean in (3, int(self.log2[-1]) + 1):  # bits per id: usually fewer, never more
            window = bits[start : start + coded * mean].view(np.bool_)
            ends = np.flatnonzero(window)[:coded]
            if len(ends) == coded:
                break
        if len(ends) < coded:
            raise ValueError(f"{len(bits)} bits do not have the counts of {ids} ids")
        n[later] = np.diff(ends, prepend=-1) - 1
        if n.max(initial=0) > self.log2[-1]:
            raise ValueError(f"a token of more than {self.spec.top_k} draws")
        return n, start + (int(ends[-1]) + 1 if coded else 0)


def seed_of(options: Mapping[str, Any]) -> int:
    """Return the seed of the draws to be made; raise StoreError unless it is a number from 0 on.

    Stores are read with any: earlier versions recorded what was given.
    """
    seed = options.get("seed", 0)
    if type(seed) is not int or seed < 0:
        raise StoreError(
            f"profile_options has seed={seed!r}: expected a whole number, at least 0, such as "
            "{seed: 1}"
        )
    return seed


def log_frequency(counts: NDArray[Any], draws: int) -> NDArray[np.float32]:
    """Return log(count / draws) as float32; -inf for a count of 0."""
    table = np.full(draws + 1, -np.inf, np.float32)
    table[1:] = np.log(np.arange(1, draws + 1) / draws)
    logs: NDArray[np.float32] = table[counts]
    return logs
