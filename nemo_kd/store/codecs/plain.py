"""ids as they are, float16 log-probabilities, float32 log-sum-exp: 4 K + 4 T bytes a token.

    stored = float16(z - L)        L = log sum_v exp(z_v), at T = 1
    z      = float32(stored) + L

Error of a log-probability: half a float16 step, 2^-11 of its size; below 0.004 nats down to
p = exp(-16). With more than 65,536 ids an id takes 4 bytes: 6 K + 4 T bytes a token.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from nemo_kd.store.codecs.base import Arrays, Codec, Teacher

UINT16_VOCABULARY = 1 << 16


class Plain(Codec):
    name = "plain"

    @property
    def dtypes(self) -> dict[str, type[np.generic]]:
        narrow = self.spec.vocab_size <= UINT16_VOCABULARY
        return {
            "topk_ids": np.uint16 if narrow else np.int32,
            "topk_logits": np.uint16,
            "lse": np.float32,
        }

    def encode(self, teacher: Teacher) -> Arrays:
        relative = relative_logits(teacher, self.unit_temperature)
        # uint32 first: an id of 2^31 or more keeps its bits under the sign of int32.
        ids = teacher.ids.astype(np.uint32).view(np.int32)
        return {
            "topk_ids": ids.astype(self.dtypes["topk_ids"]).ravel(),
            "topk_logits": torch.from_numpy(relative).half().numpy().view(np.uint16).ravel(),
            "lse": np.ascontiguousarray(teacher.logsumexp).ravel(),
        }

    def decode(self, arrays: Arrays, answers: int) -> Teacher:
        ids, logits = arrays["topk_ids"], arrays["topk_logits"]
        if ids.dtype == np.int32:
            ids = ids.view(np.uint32)
        logsumexp = arrays["lse"].reshape(answers, self.temperatures).copy()
        shape = (answers, self.spec.top_k)
        return Teacher(
            ids.reshape(shape).astype(np.int64),
            _add(logits.reshape(shape), logsumexp[:, self.unit_temperature, None]),
            logsumexp,
        )


def relative_logits(teacher: Teacher, unit_temperature: int) -> NDArray[np.float32]:
    """`z - L` [A, K] float32, at most 0: rounding may put a probability a hair above 1."""
    relative = teacher.logits - teacher.logsumexp[:, unit_temperature, None]
    return np.minimum(relative, np.float32(0), out=relative)


def _add(half_bits: NDArray[np.uint16], logsumexp: NDArray[np.float32]) -> NDArray[np.float32]:
    """[A, K] + [A, 1] → float32, by torch: its float16 conversion is vectorised, numpy's is not."""
    half = torch.from_numpy(half_bits.view(np.float16).copy())
    sums: NDArray[np.float32] = half.float().add_(torch.from_numpy(logsumexp)).numpy()
    return sums
