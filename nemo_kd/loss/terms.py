"""Cross-entropy and distillation of each token, from its logits at the label and the teacher's ids.

nll = log Σ_v exp(z_v) - z_label
kd  = T² · D(teacher, student) on the support
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_kd.errors import NemoKDError
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
from nemo_kd.loss.weights import combine
from nemo_kd.topk import TopK


def token_losses(
    logits: Tensor,
    ids: Tensor,
    teacher: TopK | None,
    config: KDConfig,
    shard: VocabShard,
    *,
    positions: Tensor | None = None,
    weights: Tensor | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """(loss, nll, kd, metrics), each [N], of logits [*, Vp] at N `positions` (None: all).

    `ids` [N, 1 + K]: the label first. Arguments and collectives are as in `sft_kd_loss`, which
    checks them first.
    """
    gathered = gather(
        logits, ids, shard, temperatures=config.temperatures, positions=positions, inplace=inplace
    )
    nll, kd, metrics = token_terms(gathered, ids, teacher, config, shard.size)
    return combine(nll, kd, config.weights if weights is None else weights), nll, kd, metrics


def token_terms(
    gathered: Gathered, ids: Tensor, teacher: TopK | None, config: KDConfig, size: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(nll, kd, metrics), each [N], from `picked` [N, 1 + K] and `outside`; no collective.

    `teacher`: at the configuration's temperature. `size`: the columns of the student's vocabulary
    that count. No branch depends on a tensor's values.
    """
    dtype = gathered.top.dtype
    if DIVERGENCES[config.divergence].in_double:
        picked, outside, top = gathered
        gathered = Gathered(picked.double(), tuple(x.double() for x in outside), top.double())
    # Absent ids have probability zero; where the label is one, it counts among those outside.
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
    unknown = (teacher.ids < 0).all(-1)  # [N]: tokens that no teacher has seen
    logits = teacher.logits.masked_fill(unknown.unsqueeze(-1), 0)
    log_q = student_bucket(student, rests[-1], config.temperature)
    log_p = _teacher_bucket(teacher, logits, config.temperature, size, nll.dtype)
    kd = config.temperature**2 * _divergence(log_p, log_q, student, logits, config)
    kd = kd.masked_fill(unknown, 0)
    for name, value in token_metrics(log_p, log_q, student, logits).items():
        metrics[name] = value.to(dtype).masked_fill(unknown, torch.nan)
    return nll.to(dtype), kd.to(dtype), metrics


def _outside_the_k(
    gathered: Gathered, best: Tensor, label: Tensor, ids: Tensor, config: KDConfig
) -> list[Tensor]:
    """log Σ over all outside the teacher's K of exp((z - best) / T) [N], for each temperature.

    That is everything outside of ids [N, 1 + K], and the label where it is not one of the K.
    """
    kept = (ids[:, 1:] == ids[:, :1]).any(-1)  # [N]
    floor = log_floor(label.dtype)
    rests = []
    for outside, temperature in zip(gathered.outside, config.temperatures, strict=True):
        outside = (outside + (gathered.top - best) / temperature).clamp_min(floor)
        rests.append(torch.logaddexp(outside, (label / temperature).masked_fill(kept, floor)))
    return rests


def _teacher_bucket(
    teacher: TopK, logits: Tensor, temperature: float, size: int, dtype: torch.dtype
) -> Tensor | None:
    """log p [N, K + 1] over the K and the rest, or None where the log-sum-exp is not known.

    A row with every id of the vocabulary has no rest, and needs no log-sum-exp.
    """
    bucket = None
    if teacher.logsumexp is not None:
        bucket = teacher_bucket(logits, teacher.logsumexp, temperature, dtype)
    if teacher.ids.shape[1] != size:
        return bucket
    absent = teacher.ids < 0
    partial = (absent.any(-1) & ~absent.all(-1)).unsqueeze(-1)
    complete = with_empty_rest(teacher_topk(logits, temperature, dtype))
    return torch.where(partial, torch.nan if bucket is None else bucket, complete)


def _divergence(
    log_p: Tensor | None, log_q: Tensor, student: Tensor, teacher: Tensor, config: KDConfig
) -> Tensor:
    """D(p, q) [N] on the configured support; `log_p`, `log_q` are the bucket's."""
    if config.support != "bucket":
        log_p = teacher_topk(teacher, config.temperature, log_q.dtype)
        if config.support == "topk":
            log_q = log_softmax(student / config.temperature)
        else:
            log_p = with_empty_rest(log_p)
    elif log_p is None:
        raise NemoKDError(
            "Support 'bucket' needs the teacher's log-sum-exp at temperature "
            f"{config.temperature:g}, and the teacher has none: dump it at that temperature, or "
            "use support 'vocab' or 'topk'."
        )
    divergence = DIVERGENCES[config.divergence]
    names = [divergence.parameter] if divergence.parameter else []
    return divergence.function(log_p, log_q, *(getattr(config, name) for name in names))
