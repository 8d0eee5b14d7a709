"""Teacher rows of several samples as batch-first tensors, and back to one row a target.

Megatron cuts a batch into micro-batches along dimension 0 and hands tensors only, so a batch
carries the teacher as `[B, A, K]`, `A` the most answer tokens of a sample in it. Padding rows are
never read: which rows are real follows from the loss mask alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from nemo_kd.loss import TopK
from nemo_kd.store import Sample, StoreError

TEACHER_KEYS = ("teacher_ids", "teacher_logits", "teacher_logsumexp")


class TeacherSelection(NamedTuple):
    """Answer positions of a micro-batch in Megatron's layout and the teacher's row for each."""

    mask: torch.Tensor  # [S, B] bool
    topk: TopK  # N rows, in row-major order of the mask's True positions


def collate_teacher(samples: Sequence[Sample], temperature_index: int) -> dict[str, torch.Tensor]:
    """Teacher rows `[A_i, K_i]` of B samples → `TEACHER_KEYS` tensors `[B, A, K]` and `[B, A]`.

    ids are int64, logits and log-sum-exp float32; `temperature_index` picks the log-sum-exp among
    the store's temperatures.
    """
    rows = max((len(sample.topk_ids) for sample in samples), default=0)
    width = max((sample.topk_ids.shape[1] for sample in samples), default=0)
    ids = torch.zeros(len(samples), rows, width, dtype=torch.int64)
    logits = torch.zeros(len(samples), rows, width)
    logsumexp = torch.zeros(len(samples), rows)
    for b, sample in enumerate(samples):
        count, kept = sample.topk_ids.shape
        if kept != width and count:
            raise StoreError(
                f"row {sample.row} has {kept} logits a token, others in its batch {width}; "
                "train on stores of one K (`nemo-kd convert` makes them alike)"
            )
        ids[b, :count] = torch.from_numpy(np.ascontiguousarray(sample.topk_ids))
        logits[b, :count] = torch.from_numpy(np.ascontiguousarray(sample.topk_logits))
        logsumexp[b, :count] = torch.from_numpy(sample.logsumexp[:, temperature_index].copy())
    return dict(zip(TEACHER_KEYS, (ids, logits, logsumexp), strict=True))


def teacher_at(batch: dict[str, torch.Tensor], loss_mask: torch.Tensor) -> TeacherSelection:
    """The teacher's rows for logits in Megatron's `[S, B, Vp]` layout.

    loss_mask [B, S]: nonzero where the label is an answer token; the a-th nonzero position of
    sample b belongs to row `[b, a]` of the teacher tensors.
    """
    mask = loss_mask.bool()
    row_of_position = mask.long().cumsum(dim=1) - 1  # [B, S]
    s, b = mask.t().nonzero(as_tuple=True)  # [N] each, row-major in [S, B]
    a = row_of_position[b, s]
    ids, logits, logsumexp = (batch[key] for key in TEACHER_KEYS)
    return TeacherSelection(mask.t(), TopK(logits[b, a], ids[b, a], logsumexp[b, a]))
