"""The loss of each token: cross-entropy and distillation from one pass over the logits.

nll  = log Σ_v exp(z_v) - z_label
kd   = T² · D(teacher, student) on the support
loss = sft_weight · nll + kd_weight · kd
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_kd.loss.compiling import never_compiled
from nemo_kd.loss.config import KDConfig
from nemo_kd.loss.divergences import DIVERGENCES
from nemo_kd.loss.metrics import token_metrics
from nemo_kd.loss.primitive import Gathered, gather
from nemo_kd.loss.shard import VocabShard
from nemo_kd.loss.supports import (
    log_floor,
    log_softmax,
    student_bucket,
    teacher_bucket,
    teacher_topk,
    with_empty_rest,
)
from nemo_kd.loss.topk import TopK, check_teacher
from nemo_kd.loss.weights import token_weights, weigh


class KDLoss(NamedTuple):
    """Per-token values in nats; `loss`, `nll` and `kd` have the labels' shape, 0 where masked.

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
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    inplace: bool = False,
) -> KDLoss:
    """loss = sft_weight · nll + kd_weight · kd, one value a token; who sums and divides is the
    caller's business.

    Layout: logits [*, Vp] are this rank's columns, in any strides and dtype; labels [*], mask [*]
    bool and the teacher are the same on every rank of `group`, and so are the results, in float32
    (float64 for float64 logits). `teacher` has one row for each True position of the mask, in
    row-major order (for each position without a mask). Only those positions are worked on: what
    labels and logits hold elsewhere is never looked at, and gets a gradient of exactly 0.
    `vocab_size`: the real vocabulary; columns beyond it are padding. `weights` [N, 2]: those of
    cross-entropy and distillation for each chosen position, instead of the configuration's; then a
    position may have no teacher (absent ids alone): its `kd` is 0, its teacher's metrics NaN. With
    `inplace` the logits' memory may be written over, and takes the gradient; else they stay as they
    are.

    Collectives: forward two all-reduces, [N] and [N, K + 2] ([N, K + 3] where T ≠ 1); backward
    none. With no position chosen there is none, the loss is 0 and the gradient too.

    Errors: ValueError for shapes that do not match, a missing teacher (or log-sum-exp) that the
    configuration needs; for CPU tensors also `check_teacher`'s, and labels out of range. On an
    accelerator these would make the host wait: there the data loader's check has to do.
    """
    shard = VocabShard.of(logits.shape[-1], group, None if config.count_padding else vocab_size)
    positions = chosen_positions(logits.shape[:-1], labels, mask)
    ids = wanted_ids(labels, positions, teacher, config, vocab_size or shard.size, weights)
    gathered = gather(
        logits, ids, shard, temperatures=config.temperatures, positions=positions, inplace=inplace
    )
    nll, kd, metrics = token_terms(gathered, ids, teacher, config, shard.size)
    loss = weigh(nll, kd, token_weights(config, weights, metrics))
    loss, nll, kd = (put_back(values, positions, labels.shape) for values in (loss, nll, kd))
    return KDLoss(loss, nll, kd, metrics)


def chosen_positions(lead: torch.Size, labels: Tensor, mask: Tensor | None) -> Tensor | None:
    """[N] int64: the mask's True positions in row-major order, or None for all.

    Errors: ValueError where labels or mask have not the logits' leading shape.
    """
    for name, tensor in (("labels", labels), ("mask", mask)):
        if tensor is not None and tensor.shape != lead:
            raise ValueError(
                f"{name} have shape {tuple(tensor.shape)}, expected {tuple(lead)}: one for each "
                "row of the logits, in the same layout."
            )
    return None if mask is None else mask.reshape(-1).nonzero().squeeze(-1)


def wanted_ids(
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
    label = (flat if positions is None else flat[positions]).unsqueeze(-1)  # [N, 1]
    if label.device.type == "cpu" and len(label):
        low, high = int(label.min()), int(label.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"Labels at chosen positions reach from {low} to {high}, expected 0 to "
                f"{vocab_size - 1}: mask the positions that have no label."
            )
    if teacher is None:
        if config.weights[1] > 0:
            raise ValueError(
                f"The weight of the distillation is {config.weights[1]:g}, but there is no "
                "teacher: give its top-K, or set alpha = 0."
            )
        return label
    _check_teacher_fits(teacher, len(label))
    if weights is None and config.support == "topk" and config.weights[1]:
        _warn_of_one_id(teacher)
    if weights is not None and weights.shape != (len(label), 2):
        raise ValueError(
            f"weights have shape {tuple(weights.shape)}, expected {(len(label), 2)}: one pair for "
            "each True position of the mask (each position without a mask)."
        )
    if teacher.ids.device.type == "cpu":
        check_teacher(teacher, vocab_size, may_be_absent=weights is not None)
    return torch.cat([label, teacher.ids], -1)


def token_terms(
    gathered: Gathered, ids: Tensor, teacher: TopK | None, config: KDConfig, size: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(nll, kd, metrics), each [N], from `picked` [N, 1 + K] and `outside`: no collective.

    `size`: the columns of the student's vocabulary that count.
    """
    dtype = gathered.top.dtype
    if DIVERGENCES[config.divergence].in_double:
        picked, outside, top = gathered
        gathered = Gathered(picked.double(), tuple(x.double() for x in outside), top.double())
    # What no id stands for is impossible, and its token is among those outside.
    floor = log_floor(gathered.top.dtype)
    picked = gathered.picked.masked_fill(ids < 0, floor)
    # Relative to the largest logit, where float32 is finest.
    best = torch.maximum(gathered.top, picked.detach().amax(-1))  # [N]
    picked = picked - best.unsqueeze(-1)
    label, student = picked[:, 0], picked[:, 1:]
    rests = _outside_the_k(gathered, best, label, ids, config)
    total = torch.logsumexp(torch.cat([student, rests[0].unsqueeze(-1)], -1), -1)
    nll = total - label
    metrics = {
        "top1_label": (label.detach() >= 0).to(dtype),
        "confidence": total.detach().neg().exp().to(dtype),
    }
    if teacher is None:
        nll = nll.to(dtype)
        return nll, torch.zeros_like(nll), metrics
    unknown = (teacher.ids < 0).all(-1)  # [N]: no teacher has seen the token
    teacher = teacher._replace(logits=teacher.logits.masked_fill(unknown.unsqueeze(-1), 0))
    log_q = student_bucket(student, rests[-1], config.temperature)
    log_p = _teacher_bucket(teacher, config.temperature, size, nll.dtype)
    kd = config.temperature**2 * _divergence(log_p, log_q, student, teacher, config)
    kd = kd.masked_fill(unknown, 0)
    for name, value in token_metrics(log_p, log_q, student, teacher.logits).items():
        metrics[name] = value.to(dtype).masked_fill(unknown, torch.nan)
    return nll.to(dtype), kd.to(dtype), metrics


def put_back(values: Tensor, positions: Tensor | None, shape: torch.Size) -> Tensor:
    """values [N] at `positions` of a tensor of `shape`, 0 elsewhere."""
    if positions is None:
        return values.view(shape)
    return values.new_zeros(shape.numel()).index_put((positions,), values).view(shape)


def _outside_the_k(
    gathered: Gathered, best: Tensor, label: Tensor, ids: Tensor, config: KDConfig
) -> list[Tensor]:
    """log Σ over all outside the teacher's K of exp((z - best) / T) [N], for each temperature.

    That is what is outside of ids [N, 1 + K], and the label where it is not one of the K.
    """
    kept = (ids[:, 1:] == ids[:, :1]).any(-1)  # [N]
    floor = log_floor(label.dtype)
    rests = []
    for outside, temperature in zip(gathered.outside, config.temperatures, strict=True):
        outside = (outside + (gathered.top - best) / temperature).clamp_min(floor)
        rests.append(torch.logaddexp(outside, (label / temperature).masked_fill(kept, floor)))
    return rests


def _teacher_bucket(
    teacher: TopK, temperature: float, size: int, dtype: torch.dtype
) -> Tensor | None:
    """log p [N, K + 1] over the K and the rest, or None where the log-sum-exp is not known."""
    if teacher.logits.shape[1] == size and not bool((teacher.ids < 0).any()):
        return with_empty_rest(teacher_topk(teacher.logits, temperature, dtype))
    if teacher.logsumexp is None:
        return None
    return teacher_bucket(teacher.logits, teacher.logsumexp, temperature, dtype)


def _divergence(
    log_p: Tensor | None, log_q: Tensor, student: Tensor, teacher: TopK, config: KDConfig
) -> Tensor:
    """D(p, q) [N] on the configured support; `log_p`, `log_q` are the bucket's."""
    if config.support != "bucket":
        log_p = teacher_topk(teacher.logits, config.temperature, log_q.dtype)
        if config.support == "topk":
            log_q = log_softmax(student / config.temperature)
        else:
            log_p = with_empty_rest(log_p)
    elif log_p is None:
        raise ValueError(
            "Support 'bucket' needs the teacher's log-sum-exp at temperature "
            f"{config.temperature:g}, and the teacher has none: dump it at that temperature, or "
            "use support 'vocab' or 'topk'."
        )
    divergence = DIVERGENCES[config.divergence]
    names = [divergence.parameter] if divergence.parameter else []
    return divergence.function(log_p, log_q, *(getattr(config, name) for name in names))


def _warn_of_one_id(teacher: TopK) -> None:
    if teacher.ids.shape[1] == 1:
        warnings.warn(
            "The teacher has one id per token (K = 1). On support 'topk' both distributions are 1 "
            "there: the distillation is 0, whatever the student is. Use support 'bucket', or a "
            "larger K.",
            stacklevel=4,
        )


def _check_teacher_fits(teacher: TopK, rows: int) -> None:
    expected = {"logits": teacher.ids.shape, "logsumexp": teacher.ids.shape[:1]}
    for name, shape in expected.items():
        tensor = getattr(teacher, name)
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"The teacher's {name} have shape {tuple(tensor.shape)}, expected {tuple(shape)} "
                f"beside ids {tuple(teacher.ids.shape)}."
            )
    if len(teacher.ids) != rows:
        raise ValueError(
            f"The teacher has {len(teacher.ids)} rows, but {rows} positions are chosen: expected "
            "one row for each True position of the mask (each position without a mask)."
        )
