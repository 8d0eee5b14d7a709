"""Like `plain`, but keeps only as many ids per token as needed to reach probability `p`.

    kept = min { k : Σ_{i<k} exp(z_i - L) >= p }, at most K;  2 + 4 kept + 4 T bytes per token

The option `p` is in (0, 1]. Ids that are not kept count towards the tail, like those beyond K, and
are decoded as absent entries. If the vocabulary exceeds 65,536: 2 + 6 kept + 4 T bytes per token.
"""

from __future__ import annotations

import numpy as np

from nemo_kd.errors import StoreError
from nemo_kd.store.codecs.base import Arrays, Codec, check_entries, ragged, relative_logits
from nemo_kd.store.codecs.plain import (
    HALF_MINUS_INFINITY,
    from_half,
    id_dtype,
    pack_ids,
    to_half,
    unpack_ids,
)
from nemo_kd.store.spec import StoreSpec
from nemo_kd.topk import ABSENT_ID, TopK

MAX_KEPT = (1 << 16) - 1


class TopP(Codec):
    name = "top_p"
    joinable = False
    options = ("p",)

    def __init__(self, spec: StoreSpec) -> None:
        super().__init__(spec)
        p = spec.profile_options.get("p")
        if not isinstance(p, int | float) or not 0 < p <= 1:
            raise StoreError(f"profile top_p needs the option p in (0, 1], not {p!r}")
        if spec.top_k > MAX_KEPT:
            raise StoreError(
                f"profile top_p keeps at most {MAX_KEPT} ids, but top_k is {spec.top_k}"
            )
        self.p = float(p)

    @property
    def dtypes(self) -> dict[str, type[np.generic]]:
        return {
            "kept": np.uint16,
            "topk_ids": id_dtype(self.spec),
            "topk_logits": np.uint16,
            "lse": np.float32,
        }

    def encode(self, topk: TopK) -> Arrays:
        check_entries(len(topk.ids), self.spec.top_k)
        relative = relative_logits(topk, self.t1)
        mass = np.exp(relative, dtype=np.float64).cumsum(axis=1)
        present = np.isfinite(relative)
        # Keep ids up to and including the one that reaches p; absent entries are never kept.
        kept = np.minimum((mass < self.p).sum(axis=1) + 1, present.sum(axis=1))
        chosen = np.arange(self.spec.top_k) < kept[:, None]
        return {
            "kept": kept.astype(np.uint16),
            "topk_ids": pack_ids(topk.ids[chosen], id_dtype(self.spec)),
            "topk_logits": to_half(relative[chosen]),
            "lse": topk.logsumexp.ravel(),
        }

    def decode(self, arrays: Arrays, answers: int) -> TopK:
        kept = arrays["kept"].reshape(answers)
        width = self.spec.top_k
        ids = ragged(kept, width, ABSENT_ID, unpack_ids(arrays["topk_ids"]))
        half = ragged(kept, width, HALF_MINUS_INFINITY, arrays["topk_logits"])
        logsumexp = arrays["lse"].reshape(answers, self.temperatures).copy()
        logits = from_half(half, logsumexp[:, self.t1, None])
        return self.topk(ids, logits, logsumexp)

    def bytes_per_token(self, kept: float) -> float:
        width = np.dtype(id_dtype(self.spec)).itemsize
        return 2 + (width + 2) * kept + 4 * self.temperatures
