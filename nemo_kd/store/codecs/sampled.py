"""K draws from the teacher's full distribution, stored as distinct ids and their counts.

    p_hat(v) = count_v / K,   E[p_hat(v)] = p(v);   1 + 3 · distinct bytes per token

After *Sparse Logit Sampling* (Anshumann et al. 2025, arXiv 2503.16870): a top-K distribution is
biased; draws are unbiased, and so is the gradient of a forward KL, which is linear in the teacher's
probabilities. `top_k` is the number of draws. The `TopK` has logits `log(count / K)` and
log-sum-exp 0; entries beyond the distinct ids are absent. An id is stored as the number
`id * K + count - 1` in as few bytes as possible: 3 if vocab_size * K is at most 2^24.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_kd.errors import StoreError
from nemo_kd.store.codecs.base import Arrays, Codec, check_entries, ragged
from nemo_kd.store.spec import StoreSpec
from nemo_kd.topk import ABSENT_ID, TopK

MAX_DRAWS = 255


class Sampled(Codec):
    name = "sampled"
    options = ("seed",)

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
        self.width = -(-(spec.vocab_size * spec.top_k - 1).bit_length() // 8)

    @property
    def dtypes(self) -> dict[str, type[np.generic]]:
        return {"distinct": np.uint8, "entries": np.uint8}

    def encode(self, topk: TopK) -> Arrays:
        draws = self.spec.top_k
        check_entries(len(topk.ids), draws)
        shares = np.exp(np.minimum(topk.logits, 0), dtype=np.float64)
        counts = np.rint(shares * draws).astype(np.int64)
        if (counts.sum(axis=1) != draws).any() or topk.logsumexp.any():
            raise StoreError(
                f"profile sampled needs the counts of {draws} draws, as logits "
                f"log(count / {draws}) with log-sum-exp 0; a top-K cannot be converted to draws"
            )
        drawn = counts > 0
        numbers = (topk.ids[drawn] * draws + counts[drawn] - 1).astype("<u8")
        octets = numbers.view(np.uint8).reshape(-1, 8)[:, : self.width]
        return {
            "distinct": drawn.sum(axis=1).astype(np.uint8),
            "entries": np.ascontiguousarray(octets).ravel(),
        }

    def decode(self, arrays: Arrays, answers: int) -> TopK:
        draws = self.spec.top_k
        octets = arrays["entries"].reshape(-1, self.width)
        padded = np.zeros((len(octets), 8), np.uint8)
        padded[:, : self.width] = octets
        numbers = padded.view("<u8").reshape(-1).astype(np.int64)
        distinct = arrays["distinct"].reshape(answers)
        ids = ragged(distinct, draws, ABSENT_ID, numbers // draws)
        counts = ragged(distinct, draws, 0, numbers % draws + 1)
        return TopK(
            ids=ids,
            logits=log_frequency(counts, draws),
            logsumexp=np.zeros((answers, 1), np.float32),
            draws=True,
        )

    def bytes_per_token(self, kept: float) -> float:
        return 1 + self.width * kept


def log_frequency(counts: NDArray[Any], draws: int) -> NDArray[np.float32]:
    """Return log(count / draws) as float32; -inf for a count of 0."""
    table = np.full(draws + 1, -np.inf, np.float32)
    table[1:] = np.log(np.arange(1, draws + 1) / draws)
    logs: NDArray[np.float32] = table[counts]
    return logs
