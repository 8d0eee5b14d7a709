"""Plain ids, float16 log-probabilities and float32 log-sum-exp: 4 K + 4 T bytes per token.

    stored = float16(z - L)        L = log sum_v exp(z_v), at T = 1
    z      = float32(stored) + L

The error of a log-probability is at most half a float16 step, a relative error of 2^-11: below
0.004 nats for p >= exp(-16). If the vocabulary exceeds 65,536, an id takes 4 bytes: 6 K + 4 T bytes
per token. Absent entries are stored as float16 -inf.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_kd.store.codecs.base import Arrays, Codec, relative_logits
from nemo_kd.store.spec import StoreSpec
from nemo_kd.topk import ABSENT_ID, TopK

UINT16_VOCABULARY = 1 << 16


class Plain(Codec):
    name = "plain"

    @property
    def dtypes(self) -> dict[str, type[np.generic]]:
        return {"topk_ids": id_dtype(self.spec), "topk_logits": np.uint16, "lse": np.float32}

    def encode(self, topk: TopK) -> Arrays:
        return {
            "topk_ids": pack_ids(topk.ids, id_dtype(self.spec)).ravel(),
            "topk_logits": to_half(relative_logits(topk, self.t1)).ravel(),
            "lse": topk.logsumexp.ravel(),
        }

    def decode(self, arrays: Arrays, answers: int) -> TopK:
        shape = (answers, self.spec.top_k)
        ids = unpack_ids(arrays["topk_ids"].reshape(shape))
        logsumexp = arrays["lse"].reshape(answers, self.temperatures).copy()
        half = arrays["topk_logits"].reshape(shape)
        logits = from_half(half, logsumexp[:, self.t1, None])
        if np.maximum.reduce(half[:, -1], initial=0) >= HALF_MINUS_INFINITY:
            ids[half == HALF_MINUS_INFINITY] = ABSENT_ID
        return self.topk(ids, logits, logsumexp)

    def bytes_per_token(self, kept: float) -> float:
        width = np.dtype(id_dtype(self.spec)).itemsize
        return (width + 2) * self.spec.top_k + 4 * self.temperatures


HALF_MINUS_INFINITY = 0xFC00


def id_dtype(spec: StoreSpec) -> type[np.generic]:
    return np.uint16 if spec.vocab_size <= UINT16_VOCABULARY else np.int32


def pack_ids(ids: NDArray[np.int64], dtype: type[np.generic]) -> NDArray[Any]:
    """Convert ids to uint16, or to their low 32 bits as int32; an absent id becomes all ones."""
    if dtype == np.int32:
        return ids.astype(np.uint32).view(np.int32)
    return ids.astype(dtype)


def unpack_ids(packed: NDArray[Any]) -> NDArray[np.int64]:
    return (packed.view(np.uint32) if packed.dtype == np.int32 else packed).astype(np.int64)


def to_half(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the float16 bits of values, rounded to nearest even.

    Uses torch, whose conversion is vectorised; numpy's is not.
    """
    import torch  # imported late: it takes a second, and not every `nemo-kd` command needs it

    bits: NDArray[np.uint16] = torch.from_numpy(values).half().numpy().view(np.uint16)
    return bits


def from_half(bits: NDArray[np.uint16], added: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return float32(bits) + added, with `added` broadcast."""
    import torch

    half = torch.from_numpy(bits.view(np.float16).copy())  # torch warns about read-only memory
    sums: NDArray[np.float32] = torch.add(half, torch.from_numpy(added)).numpy()
    return sums
