"""Whether the part of a store that an earlier run wrote is of the teacher that is answering now.

Only for a teacher without a fingerprint: a server tells nothing that identifies its weights.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nemo_kd.errors import NemoKDError, StoreError
from nemo_kd.sft import RowError
from nemo_kd.sft.rows import Row
from nemo_kd.store import Sample, StoreSpec, StoreWriter
from nemo_kd.store.parts import part_number, shard_directories
from nemo_kd.store.shard import Shard
from nemo_kd.teacher.interface import Forward
from nemo_kd.teacher.layout import Layout
from nemo_kd.topk import TopK

IDS = 5
"""Number of the stored ids that are compared at a position."""

APART = 0.5
"""Nats by which a log-probability may differ: bfloat16 in another batch gives about 0.1."""

SHARE = 0.5
"""Fraction of positions beyond it that is no rounding any more."""


def check_earlier_part(directory: str, spec: StoreSpec, forward: Forward, layout: Layout) -> None:
    """Ask the teacher for one sample of a complete shard again, and compare.

    Raises NemoKDError on every rank if the log-probabilities are others. Rank 0 asks. Collective: a
    broadcast.
    """
    refusal = ""
    sample = _sample(Path(directory), spec) if layout.rank == 0 else None
    if sample is not None:
        row = Row(sample.row, sample.input_ids, sample.loss_mask)
        now = next(iter(forward([row], 1) or ()), None)
        share = 0.0
        if isinstance(now, RowError):
            refusal = str(now)
        elif now is not None:
            share = float(np.mean(apart(sample.topk, now) > APART))
        if share > SHARE:
            refusal = (
                f"{directory}: an earlier run has complete shards of this store, but the teacher "
                f"now gives other log-probabilities at {share:.0%} of the tokens of row "
                f"{sample.row}: another model is served under the same name; serve the first one "
                "again, or dump all rows into another output_dir"
            )
    refusal = layout.from_rank_0(refusal)
    if refusal:
        raise NemoKDError(refusal)


def apart(stored: TopK, now: TopK) -> NDArray[np.float64]:
    """Largest difference [A] of the log-probabilities of the first stored ids, in nats.

    An id that the teacher does not return now has at most the smallest that it returns.
    """
    ids = np.asarray(stored.ids)[:, :IDS]
    theirs = np.asarray(now.ids)
    before = _log_probabilities(stored)[:, :IDS]
    after = _log_probabilities(now)
    found = ids[:, :, None] == theirs[:, None, :]  # [A, IDS, K]
    same = np.where(found, after[:, None, :], -np.inf).max(2)
    difference = np.where(
        found.any(2), np.abs(before - same), np.maximum(before - after.min(1, keepdims=True), 0)
    )
    return np.where(np.isfinite(difference), difference, 0).max(1, initial=0)


def _log_probabilities(topk: TopK) -> NDArray[np.float64]:
    logsumexp = np.asarray(topk.logsumexp, np.float64).reshape(len(topk), -1)[:, :1]
    return np.asarray(topk.logits, np.float64) - logsumexp


def _sample(directory: Path, spec: StoreSpec) -> Sample | None:
    """Return the first sample of a complete shard; None without one."""
    writer = StoreWriter(directory, spec)
    for path in shard_directories(directory):
        info = writer.complete_shard(part_number(path))
        if info is not None and info.samples:
            try:
                return Shard(directory, info, writer.codec).sample(0)
            except StoreError:
                continue  # `verify` tells of a damaged one
    return None
