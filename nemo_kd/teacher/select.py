"""What is kept of the teacher's logits at an answer token, as the store's profile wants it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from nemo_kd.loss import vocab_parallel_topk
from nemo_kd.sft.rows import Row
from nemo_kd.store import StoreSpec
from nemo_kd.store.codecs import Sampled
from nemo_kd.teacher.sampling import uniforms, vocab_parallel_sample
from nemo_kd.topk import TopK


class Selection:
    """The K largest logits, or for the profile `sampled` K draws from the whole distribution."""

    def __init__(self, spec: StoreSpec, group: dist.ProcessGroup | None = None) -> None:
        self.spec = spec
        self.group = group
        self.draws = spec.profile == Sampled.name

    def uniform(self, rows: Sequence[Row]) -> torch.Tensor:
        """[N] float64 in [0, 1): one for each answer token of `rows`, whatever batch they are in.

        Zeros where nothing is drawn.
        """
        counts = [int(row.loss_mask[1:].sum()) for row in rows]
        if not self.draws:
            return torch.zeros(sum(counts), dtype=torch.float64)
        seed = int(self.spec.profile_options.get("seed", 0))
        return torch.cat(
            [uniforms(seed, row.row, count) for row, count in zip(rows, counts, strict=True)]
        )

    def __call__(self, logits: torch.Tensor, uniform: torch.Tensor) -> TopK:
        """logits [n, Vp] of this rank, uniform [n] → ids and logits [n, K], logsumexp [n, T].

        The same on every rank of the group; collectives as the two functions it calls.
        """
        vocab_size = self.spec.vocab_size
        if self.draws:
            topk = vocab_parallel_sample(
                logits, self.spec.top_k, uniform, group=self.group, vocab_size=vocab_size
            )
        else:
            topk = vocab_parallel_topk(
                logits,
                self.spec.top_k,
                group=self.group,
                vocab_size=vocab_size,
                temperatures=self.spec.temperatures,
            )
        assert topk.logsumexp is not None
        return replace(topk, logsumexp=topk.logsumexp.reshape(len(logits), -1))
