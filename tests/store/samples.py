"""Samples with a real teacher's shape: the top of a whole distribution, ids in any place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemo_kd.store import Sample, StoreSpec, StoreWriter
from nemo_kd.store.segments import Packing
from nemo_kd.topk import TopK


def spec(**changes: Any) -> StoreSpec:
    values: dict[str, Any] = {
        "top_k": 5,
        "vocab_size": 500,
        "rows_per_shard": 3,
        "tokenizer": {"fingerprint": "a" * 64, "library": "huggingface", "path": None},
        "teacher": {"name": "teacher.nemo", "fingerprint": "b" * 64},
        "template": {"max_seq_length": 128},
        "source": {"name": "train.jsonl", "rows": 7},
    }
    return StoreSpec(**{**values, **changes})


def sample(row: int, of: StoreSpec, answers: int, prompt: int = 3, spread: float = 2.0) -> Sample:
    """`spread`: standard deviation of the logits; large is a peaked teacher."""
    rng = np.random.default_rng([row, answers, of.vocab_size, of.top_k])
    vocabulary = min(of.vocab_size, 4096)  # the rest of a large vocabulary has no mass
    z = rng.normal(0, spread, (answers, vocabulary)).astype(np.float32)
    ids = np.argsort(-z, axis=1)[:, : of.top_k]
    logits = np.take_along_axis(z, ids, 1)
    logsumexp = [np.logaddexp.reduce(z.astype(np.float64) / t, axis=1) for t in of.temperatures]
    # Spread over the whole width of ids, the last one always among them.
    stretched = ids.astype(np.int64) * ((of.vocab_size - 1) // max(vocabulary - 1, 1))
    stretched += (of.vocab_size - 1) - stretched.max(initial=0)
    return Sample(
        row=row,
        input_ids=rng.integers(0, min(of.vocab_size, 2**31), prompt + answers).astype(np.int32),
        loss_mask=np.array([0] * prompt + [1] * answers, dtype=np.uint8),
        topk=TopK(
            ids=stretched,
            logits=logits,
            logsumexp=np.stack(logsumexp, axis=1)
            .astype(np.float32)
            .reshape(answers, len(of.temperatures)),
            temperatures=of.temperatures,
        ),
    )


def with_topk(one: Sample, **arrays: Any) -> Sample:
    """The sample with other arrays of its `TopK`."""
    return replace(one, topk=replace(one.topk, **arrays))


def each_array(one: Sample, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Sample:
    """The sample with each array of its `TopK` changed alike."""
    return replace(one, topk=one.topk.map(change))


def write(directory: Path, of: StoreSpec, samples: Sequence[Sample], parts: bool = True) -> Path:
    """A whole store; rows need not be all there. `parts`: segments of as many rows as a shard."""
    writer = StoreWriter(directory, of)
    shards = max((s.row for s in samples), default=-1) // of.rows_per_shard + 1
    for shard in range(shards):
        with writer.shard(shard) as out:
            for one in samples:
                if one.row // of.rows_per_shard == shard:
                    out.add(one)
    if parts:
        last = max((one.row for one in samples), default=-1)
        Packing(of.rows_per_shard, last + 1, len(samples)).write(directory)
    writer.finish(shards)
    return directory


def store(directory: Path, of: StoreSpec, rows: int = 7, parts: bool = True) -> Path:
    return write(
        directory, of, [sample(row, of, answers=1 + row % 4) for row in range(rows)], parts
    )
