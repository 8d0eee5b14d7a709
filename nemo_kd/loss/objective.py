"""The loss of each token: cross-entropy and distillation from one pass over the logits.

loss = sft_weight · nll + kd_weight · kd
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_kd.errors import NemoKDError
from nemo_kd.loss.compiling import never_compiled
from nemo_kd.loss.config import KDConfig
from nemo_kd.loss.linearity import nonlinear_settings
from nemo_kd.loss.schedule import refuse_scheduled
from nemo_kd.loss.shard import VocabShard
from nemo_kd.loss.terms import token_losses
from nemo_kd.loss.topk import check_teacher
from nemo_kd.topk import TopK


class KDLoss(NamedTuple):
    """Per-token values in nats; `loss`, `nll` and `kd` have the labels' shape, 0 where not chosen.

    `metrics`: name → detached [N], one value for each chosen position: those of `token_metrics`,
    and top1_label: 1 where the label is the student's best token, confidence: that best token's
    probability at temperature 1.
    """

    loss: Tensor
    nll: Tensor
    kd: Tensor
    metrics: dict[str, Tensor]


@never_compiled
def sft_kd_loss(
    logits: Tensor,
    labels: Tensor,
    teacher: TopK | None,
    config: KDConfig,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    inplace: bool = False,
) -> KDLoss:
    """loss = sft_weight · nll + kd_weight · kd, one value per token; the caller sums and divides.

    Layout: logits [*, Vp] are this rank's columns, in any strides and dtype; labels [*],
    positions, mask and the teacher are the same on every rank of `group`, and so are the results,
    in float32 (float64 for float64 logits).

    `positions` [N] int64 chooses the tokens that count: ascending indices into the flattened
    leading dimensions, without repeats. `mask` [*] bool chooses its True positions instead, for
    which a GPU makes the host wait. Without either, all positions are chosen. What labels and
    logits hold elsewhere is never read, and gets a gradient of exactly 0. `teacher` has one row for
    each chosen position, and its log-sum-exp at the configuration's temperature.

    `vocab_size`: the real vocabulary; columns beyond it are padding. `weights` [N, 2]: those of
    cross-entropy and distillation for each chosen position, instead of the configuration's; then a
    position may have no teacher (absent ids only): its `kd` is 0, its teacher's metrics NaN.

    `inplace`: the logits' memory may be written over and takes the gradient, where gradients are
    recorded; under `torch.no_grad`, and in the first pass of activation checkpointing, it stays as
    it is. The logits must not be used after the call: their values are lost. Another operation that
    needs them for its gradient gets autograd's error "modified by an inplace operation", as does a
    second backward pass; a later operation that only reads their values gets no error.

    Collectives: forward two all-reduces, [N] and [N, K + 2] ([N, K + 3] where T ≠ 1); backward
    none. With no position chosen there is none, the loss is 0 and the gradient too.

    Errors: NemoKDError for shapes that do not match, a mask that is not bool, a missing teacher (or
    log-sum-exp) that the configuration needs, a log-sum-exp at another temperature, random draws in
    a loss that they bias, and a schedule without its step; for CPU tensors also `check_teacher`'s,
    labels out of range and positions that do not ascend. On an accelerator these would make the
    host wait: there the data loader has to check.
    """
    refuse_scheduled(config)
    shard = VocabShard.of(logits.shape[-1], group, None if config.count_padding else vocab_size)
    positions = chosen_positions(logits.shape[:-1], labels, positions, mask)
    teacher = checked_teacher(teacher, config, weights)
    ids = gather_ids(labels, positions, teacher, config, vocab_size or shard.size, weights)
    *values, metrics = token_losses(
        logits, ids, teacher, config, shard, positions=positions, weights=weights, inplace=inplace
    )
    loss, nll, kd = (scatter_back(value, positions, labels.shape) for value in values)
    return KDLoss(loss, nll, kd, metrics)


def chosen_positions(
    lead: torch.Size, labels: Tensor, positions: Tensor | None, mask: Tensor | None
) -> Tensor | None:
    """[N] int64: `positions`, or the mask's True positions in row-major order, or None for all.

    Errors: NemoKDError if labels or mask do not have the logits' leading shape, if the mask is not
    bool, if positions and mask are both given, and for positions on a CPU that do not ascend.
    """
    for name, tensor in (("labels", labels), ("mask", mask)):
        if tensor is not None and tensor.shape != lead:
            raise NemoKDError(
                f"{name} have shape {tuple(tensor.shape)}, expected {tuple(lead)}: one for each "
                "row of the logits, in the same layout."
            )
    if mask is None:
        if positions is not None and positions.device.type == "cpu":
            _check_ascending(positions)
        return positions
    if positions is not None:
        raise NemoKDError("positions and mask are both given: give only one of them.")
    if mask.dtype != torch.bool:
        raise NemoKDError(
            f"mask is {mask.dtype}, expected torch.bool: for weights between 0 and 1 give weights."
        )
    return mask.reshape(-1).nonzero().squeeze(-1)


def checked_teacher(teacher: TopK | None, config: KDConfig, weights: Tensor | None) -> TopK | None:
    """The teacher at the configuration's temperature; None if there is none.

    Errors: NemoKDError if the distillation has a weight but no teacher, if the log-sum-exp is known
    at other temperatures only, and for draws that bias the gradient.
    """
    distils = config.weights[1] > 0
    if teacher is None:
        if distils:
            raise NemoKDError(
                f"The weight of the distillation is {config.weights[1]:g}, but there is no "
                "teacher: give its top-K, or set alpha = 0."
            )
        return None
    biased = (
        nonlinear_settings(config) if teacher.draws and (distils or weights is not None) else ()
    )
    if biased:
        settings = ", ".join(f"{name}={getattr(config, name)}" for name in biased)
        raise NemoKDError(
            "The teacher's rows are random draws. They are unbiased only in a loss whose gradient "
            f"is linear in the teacher's probabilities, which it is not with {settings}: "
            "leave that at its default, or use a teacher's top-K."
        )
    return teacher.at(config.temperature)


def gather_ids(
    labels: Tensor,
    positions: Tensor | None,
    teacher: TopK | None,
    config: KDConfig,
    vocab_size: int,
    weights: Tensor | None = None,
) -> Tensor:
    """[N, 1 + K] int64: the label and the teacher's ids at each chosen position.

    Errors: as `sft_kd_loss`.
    """
    flat = labels.reshape(-1)
    rows = len(flat if positions is None else positions)
    if weights is not None and weights.shape != (rows, 2):
        raise NemoKDError(
            f"weights have shape {tuple(weights.shape)}, expected {(rows, 2)}: one pair for each "
            "chosen position."
        )
    label = (flat if positions is None else flat[positions]).unsqueeze(-1)  # [N, 1]
    if label.device.type == "cpu" and len(label):
        low, high = int(label.min()), int(label.max())
        if low < 0 or high >= vocab_size:
            raise NemoKDError(
                f"Labels at chosen positions range from {low} to {high}, expected 0 to "
                f"{vocab_size - 1}: mask the positions that have no label."
            )
    if teacher is None:
        return label
    if len(teacher) != rows:
        raise NemoKDError(
            f"The teacher has {len(teacher)} rows, but {rows} positions are chosen: expected one "
            "row for each of them."
        )
    if weights is None and config.support == "topk" and config.weights[1]:
        _warn_of_one_id(teacher)
    if teacher.ids.device.type == "cpu":
        check_teacher(teacher, vocab_size, may_be_absent=weights is not None)
    return torch.cat([label, teacher.ids], -1)


def scatter_back(values: Tensor, positions: Tensor | None, shape: torch.Size) -> Tensor:
    """values [N] at `positions` of a tensor of `shape`, 0 elsewhere."""
    if positions is None:
        return values.view(shape)
    return values.new_zeros(shape.numel()).index_put((positions,), values).view(shape)


def _check_ascending(positions: Tensor) -> None:
    """Raise NemoKDError for a repeated position, whose gradient would be undefined."""
    wrong = positions[1:] <= positions[:-1]
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise NemoKDError(
            f"positions have {int(positions[first + 1])} after {int(positions[first])}: expected "
            "each once, in ascending order."
        )


def _warn_of_one_id(teacher: TopK) -> None:
    if teacher.ids.shape[1] == 1:
        warnings.warn(
            "The teacher has one id per token (K = 1). With support 'topk' both distributions are "
            "1 at it: the distillation is 0 for every student. Use support 'bucket', or a larger "
            "K.",
            stacklevel=4,
        )
