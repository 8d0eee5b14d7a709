"""Selection of the logits that a store's profile keeps for an answer token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from nemo_kd.loss import vocab_parallel_topk
from nemo_kd.sft.rows import Row
from nemo_kd.store import StoreSpec
from nemo_kd.store.codecs import Sampled
from nemo_kd.store.codecs.sampled import seed_of
from nemo_kd.teacher.sampling import uniforms, vocab_parallel_sample
from nemo_kd.topk import TopK


class Selection:
    """The K largest logits, or for the profile `sampled` K draws from the full distribution."""

    def __init__(self, spec: StoreSpec, group: dist.ProcessGroup | None = None) -> None:
        self.spec = spec
        self.group = group
        self.draws = spec.profile == Sampled.name
        self.seed = seed_of(spec.profile_options) if self.draws else 0

    def uniform(self, rows: Sequence[Row]) -> torch.Tensor:
        """Return one random number per answer token of `rows`: [N] float64 in [0, 1).

        The numbers do not depend on the batch; they are zeros for profiles without draws.
        """
        counts = [int(row.loss_mask[1:].sum()) for row in rows]
        if not self.draws:
            return torch.zeros(sum(counts), dtype=torch.float64)
        return torch.cat(
            [uniforms(self.seed, row.row, count) for row, count in zip(rows, counts, strict=True)]
        )

    def __call__(self, logits: torch.Tensor, uniform: torch.Tensor) -> TopK:
        """Select from this rank's logits [n, Vp], given the random numbers uniform [n].

        Returns ids and logits [n, K] and logsumexp [n, T], the same on every rank of the group.
        Collectives: those of `vocab_parallel_topk` or `vocab_parallel_sample`.
        """
        spec, group = self.spec, self.group
        if self.draws:
            found = vocab_parallel_sample(
                logits, spec.top_k, uniform, group=group, vocab_size=spec.vocab_size
            )
        else:
            found = vocab_parallel_topk(
                logits,
                spec.top_k,
                group=group,
                vocab_size=spec.vocab_size,
                temperatures=spec.temperatures,
            )
        assert found.logsumexp is not None
        return replace(found, logsumexp=found.logsumexp.reshape(len(logits), -1))


def joined(parts: Sequence[TopK]) -> TopK:
    """Concatenate the rows of several `TopK`s and move them to the CPU."""
    return replace(
        parts[0],
        ids=torch.cat([part.ids for part in parts]).cpu(),
        logits=torch.cat([part.logits for part in parts]).cpu(),
        logsumexp=torch.cat([part.logsumexp for part in parts]).cpu(),
    )
