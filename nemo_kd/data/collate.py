"""Teacher rows of several samples as batch-first tensors, and back to one row a target.

Megatron cuts a batch into micro-batches along dimension 0 and hands tensors only, so a batch
carries the teacher as `[B, A, K]`, `A` the most answer tokens of a sample in it, `K` the most ids
of an answer token. Padding rows are never read: which rows are real follows from the loss mask
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from nemo_kd.store import Sample
from nemo_kd.topk import ABSENT_ID, TopK

TEACHER_KEYS = ("teacher_ids", "teacher_logits", "teacher_logsumexp", "teacher_alpha")


class TeacherRows(NamedTuple):
    """The teacher at the A answer tokens of a sample, at one temperature.

    A sample without a teacher has absent ids alone: `TeacherRows.none`.
    """

    ids: NDArray[np.int64]  # [A, K]; absent places are last, with id -1 and logit -inf
    logits: NDArray[np.float32]  # [A, K]
    logsumexp: NDArray[np.float32]  # [A]
    alpha: float | None = None
    """The sample's own weight of the distillation; None: the training's."""

    @classmethod
    def of(cls, sample: Sample, temperature_index: int, alpha: float | None = None) -> TeacherRows:
        """`temperature_index` picks the log-sum-exp among the store's temperatures."""
        ids, logits = sample.topk.ids, sample.topk.logits
        width = int((ids != ABSENT_ID).any(axis=0).sum()) if len(ids) else ids.shape[1]
        logsumexp = sample.topk.logsumexp[:, temperature_index]
        return cls(ids[:, :width], logits[:, :width], logsumexp, alpha)

    @classmethod
    def none(cls, answer_tokens: int) -> TeacherRows:
        """Of a sample that no teacher has seen: its cross-entropy alone is learned."""
        ids = np.full((answer_tokens, 1), ABSENT_ID)
        logits = np.full(ids.shape, -np.inf, np.float32)
        return cls(ids, logits, np.zeros(answer_tokens, np.float32), 0.0)

    @classmethod
    def joined(cls, parts: Sequence[TeacherRows]) -> TeacherRows:
        """Of several samples of one alpha, one after the other; with the most ids of any."""
        (alpha,) = {part.alpha for part in parts}
        width = max(part.ids.shape[1] for part in parts)

        def widened(array: NDArray[Any], absent: float) -> NDArray[Any]:
            missing = width - array.shape[1]
            return np.pad(array, ((0, 0), (0, missing)), constant_values=absent)

        return cls(
            np.concatenate([widened(part.ids, ABSENT_ID) for part in parts]),
            np.concatenate([widened(part.logits, -np.inf) for part in parts]),
            np.concatenate([part.logsumexp for part in parts]),
            alpha,
        )


class TeacherSelection(NamedTuple):
    """Answer positions of a micro-batch in Megatron's layout and the teacher's row for each."""

    mask: torch.Tensor  # [S, B] bool
    topk: TopK  # N rows, in row-major order of the mask's True positions
    alpha: torch.Tensor | None = None  # [N] float32, NaN where the training's weights hold

    def weights(self, of_training: tuple[float, float]) -> torch.Tensor | None:
        """[N, 2]: weights of cross-entropy and distillation; None: the training's everywhere."""
        if self.alpha is None:
            return None
        own = torch.stack([1 - self.alpha, self.alpha], -1)
        return torch.where(own.isnan(), own.new_tensor(of_training), own)


def collate_teacher(teachers: Sequence[TeacherRows]) -> dict[str, torch.Tensor]:
    """Teacher rows of B samples → `TEACHER_KEYS` tensors `[B, A, K]`, `[B, A]` and `[B]`.

    ids are int64, the others float32; `teacher_alpha` has NaN for None, and is left out where all
    are. Samples of several K, or of a K that differs from token to token, get absent ids.
    """
    rows = max((len(teacher.ids) for teacher in teachers), default=0)
    width = max((teacher.ids.shape[1] for teacher in teachers), default=0)
    ids = torch.full((len(teachers), rows, width), ABSENT_ID)
    logits = torch.full((len(teachers), rows, width), -torch.inf)
    logsumexp = torch.zeros(len(teachers), rows)
    for b, teacher in enumerate(teachers):
        count, kept = teacher.ids.shape
        ids[b, :count, :kept] = torch.from_numpy(np.ascontiguousarray(teacher.ids))
        logits[b, :count, :kept] = torch.from_numpy(np.ascontiguousarray(teacher.logits))
        logsumexp[b, :count] = torch.from_numpy(np.ascontiguousarray(teacher.logsumexp))
    tensors = dict(zip(TEACHER_KEYS, (ids, logits, logsumexp), strict=False))
    if any(teacher.alpha is not None for teacher in teachers):
        alphas = [torch.nan if teacher.alpha is None else teacher.alpha for teacher in teachers]
        tensors["teacher_alpha"] = torch.tensor(alphas)
    return tensors


def teacher_at(
    batch: dict[str, torch.Tensor],
    loss_mask: torch.Tensor,
    positions: torch.Tensor | None = None,
) -> TeacherSelection:
    """The teacher's rows for logits in Megatron's `[S, B, Vp]` layout.

    loss_mask [B, S]: nonzero where the label is an answer token; the a-th nonzero position of
    sample b belongs to row `[b, a]` of the teacher tensors. With `positions` [P] of the sequence,
    such as a context-parallel rank has, the logits are those there, `[P, B, Vp]`.
    """
    mask = loss_mask.bool()
    row_of_position = mask.long().cumsum(dim=1) - 1  # [B, S]
    if positions is not None:
        mask, row_of_position = mask[:, positions], row_of_position[:, positions]  # [B, P]
    s, b = mask.t().nonzero(as_tuple=True)  # [N] each, row-major in [S, B]
    a = row_of_position[b, s]
    ids, logits, logsumexp = (batch[key] for key in TEACHER_KEYS[:3])
    alpha = batch.get("teacher_alpha")
    return TeacherSelection(
        mask.t(),
        TopK(ids=ids[b, a], logits=logits[b, a], logsumexp=logsumexp[b, a]),
        None if alpha is None else alpha[b],
    )
