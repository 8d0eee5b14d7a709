"""The answer tokens of a micro-batch: their positions in the logits and the teacher's rows.

Megatron's logits are [S, B, Vp]; position s of sequence b is row `s * B + b` of them. Everything is
computed on the CPU, when a micro-batch is collated, so that the loss reads no size from a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nemo_kd.errors import NemoKDError
from nemo_kd.store import Sample
from nemo_kd.topk import ABSENT_ID, TopK


@dataclass(frozen=True, eq=False)
class AnswerTokens:
    """The N answer tokens of a micro-batch that belong to this context-parallel rank."""

    positions: torch.Tensor
    """[N] int64, ascending: rows of the flattened logits [S * B, Vp]."""

    topk: TopK
    """N rows at one temperature; only absent ids where a sequence has no teacher."""

    alpha: torch.Tensor | None = None
    """[N] float32: weight of the distillation in the token's sequence, NaN where the training's
    weights apply; None if they apply to all sequences."""

    def weights(self, of_training: tuple[float, float]) -> torch.Tensor | None:
        """[N, 2]: weights of cross-entropy and distillation; None if the training's apply."""
        if self.alpha is None:
            return None
        both = 1 - self.alpha, self.alpha
        own = (torch.where(x.isnan(), w, x) for x, w in zip(both, of_training, strict=True))
        return torch.stack(tuple(own), -1)

    def to(self, device: torch.device | int | str, *, non_blocking: bool = False) -> AnswerTokens:
        """A copy on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> AnswerTokens:
        """A copy in pinned memory; called by `DataLoader(pin_memory=True)`."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> AnswerTokens:
        alpha = None if self.alpha is None else function(self.alpha)
        return AnswerTokens(function(self.positions), self.topk.map(function), alpha)


def teacher_of(sample: Sample, temperature: float) -> TopK:
    """The sample's numpy rows with the log-sum-exp at `temperature`, trimmed to the longest row."""
    topk = sample.topk.at(temperature)
    present = (topk.ids != ABSENT_ID).any(axis=0)
    width = int(present.sum()) if len(topk) else len(present)
    return replace(topk, ids=topk.ids[:, :width], logits=topk.logits[:, :width])


def no_teacher(answer_tokens: int, temperature: float) -> TopK:
    """Rows of absent ids, for a sample trained with cross-entropy only."""
    return TopK(
        ids=np.full((answer_tokens, 1), ABSENT_ID),
        logits=np.full((answer_tokens, 1), -np.inf, np.float32),
        logsumexp=np.zeros(answer_tokens, np.float32),
        temperatures=(temperature,),
    )


def joined(parts: Sequence[TopK]) -> TopK:
    """Concatenate the numpy rows of all parts; narrower parts are padded with absent ids.

    The result holds draws if any part does.
    """
    width = max(part.ids.shape[1] for part in parts)

    def widened(array: NDArray[Any], absent: float) -> NDArray[Any]:
        missing = width - array.shape[1]
        return np.pad(array, ((0, 0), (0, missing)), constant_values=absent) if missing else array

    return TopK(
        ids=np.concatenate([widened(part.ids, ABSENT_ID) for part in parts]),
        logits=np.concatenate([widened(part.logits, -np.inf) for part in parts]),
        logsumexp=np.concatenate([part.logsumexp for part in parts]),
        temperatures=parts[0].temperatures,
        draws=any(part.draws for part in parts),
    )


def answer_tokens(
    loss_mask: torch.Tensor,
    teachers: Sequence[TopK],
    alphas: Sequence[float | None] | None = None,
    own_positions: torch.Tensor | None = None,
) -> AnswerTokens:
    """The answer tokens of a micro-batch of B sequences.

    loss_mask [B, S]: nonzero where the label is an answer token; the a-th such position of sequence
    b belongs to row a of `teachers[b]`. If all are 0, as in a repeated sequence, it uses none
    of its rows. `alphas`: one per sequence, None for the training's weights.
    `own_positions` [P]: the positions of the sequence on this context-parallel rank, whose
    logits are [P, B, Vp].

    Errors: NemoKDError if a mask has more or fewer answer tokens than the teacher has rows.
    """
    mask = loss_mask.numpy() != 0
    counts = mask.sum(axis=1)
    for b, (count, teacher) in enumerate(zip(counts, teachers, strict=True)):
        if count not in (0, len(teacher)):
            raise NemoKDError(
                f"sequence {b} of a micro-batch has {count} answer tokens in its loss mask, but "
                f"its teacher has {len(teacher)} rows"
            )
    used = [teacher[:count] for count, teacher in zip(counts, teachers, strict=True)]
    b, s = mask.nonzero()  # [N] each
    if own_positions is not None:
        local = np.full(mask.shape[1], -1)
        local[own_positions.numpy()] = np.arange(len(own_positions))
        s = local[s]
    positions = s * len(mask) + b
    order = np.argsort(positions, kind="stable")
    order = order[s[order] >= 0]
    alpha = None
    if alphas is not None and any(each is not None for each in alphas):
        own = np.array([np.nan if each is None else each for each in alphas], np.float32)
        alpha = torch.from_numpy(own[b[order]])
    return AnswerTokens(torch.from_numpy(positions[order]), joined(used)[order].tensors(), alpha)
