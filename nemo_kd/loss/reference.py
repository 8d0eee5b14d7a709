"""The losses by definition: dense, float64, one process. The oracle of the tests.

Nothing here is fast, sharded or careful with memory; it is meant to be believed at a glance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_kd.loss.config import KDConfig
from nemo_kd.loss.supports import MIN_TAIL_PROB
from nemo_kd.topk import TopK


def topk(logits: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """The K largest of logits [N, V], ties to the lower id, and log Σ exp(z / T); float64."""
    z = logits.double()
    ids = z.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return TopK(
        ids=ids,
        logits=z.gather(1, ids),
        logsumexp=torch.logsumexp(z / temperature, -1),
        temperatures=(temperature,),
    )


def sft_kd_loss(
    logits: Tensor, labels: Tensor, teacher: TopK, config: KDConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, nll, kd) [N] of student logits [N, V] over the real vocabulary; differentiable."""
    z = logits.double()
    nll = -z.log_softmax(-1).gather(1, labels.unsqueeze(1)).squeeze(1)
    p, q = distributions(z, teacher, config)
    kd = config.temperature**2 * divergence(p, q, config)
    sft_weight, kd_weight = config.weights
    return sft_weight * nll + kd_weight * kd, nll, kd


def distributions(z: Tensor, teacher: TopK, config: KDConfig) -> tuple[Tensor, Tensor]:
    """(teacher's, student's) probabilities [N, J] on the support; J = K, K + 1 or V."""
    temperature, ids = config.temperature, teacher.ids
    t, s = teacher.logits.double() / temperature, z / temperature
    q = s.softmax(-1)  # [N, V]
    if config.support == "topk":
        return t.softmax(-1), s.gather(1, ids).softmax(-1)
    if config.support == "vocab":
        return torch.zeros_like(q).scatter(1, ids, t.softmax(-1)), q
    assert teacher.logsumexp is not None
    p_kept = torch.exp(t - teacher.logsumexp.double().unsqueeze(1))  # [N, K]
    q_kept = q.gather(1, ids)
    if ids.shape[1] == z.shape[1]:  # nothing is outside
        return p_kept, q_kept
    outside = torch.ones_like(q).scatter(1, ids, 0.0)
    q_rest = (q * outside).sum(1, keepdim=True)
    p_rest = (1 - p_kept.sum(1, keepdim=True)).clamp_min(MIN_TAIL_PROB)
    return torch.cat([p_kept, p_rest], 1), torch.cat([q_kept, q_rest], 1)


def divergence(p: Tensor, q: Tensor, config: KDConfig) -> Tensor:
    """D(p, q) [N]."""
    beta, skew = config.beta, config.skew
    if config.divergence == "forward_kl":
        return kl(p, q)
    if config.divergence == "reverse_kl":
        return kl(q, p)
    if config.divergence == "jsd":
        mixture = beta * p + (1 - beta) * q
        return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)
    if config.divergence == "skew_forward_kl":
        return kl(p, skew * p + (1 - skew) * q)
    return kl(q, skew * q + (1 - skew) * p)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Σ p log(p / q), where 0 log 0 is 0."""
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)
