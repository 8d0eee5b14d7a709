"""Weights of the two losses: the configuration's, per token, or at selected tokens only."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_kd.loss.config import KDConfig

Weights = tuple[float, float] | Tensor
"""(cross-entropy, distillation) for all tokens, or [N, 2] per token."""


def token_weights(config: KDConfig, weights: Tensor | None, metrics: dict[str, Tensor]) -> Weights:
    """The configuration's weights, or `weights` [N, 2], at the selected positions.

    `top_entropy_fraction` f < 1 selects, among the tokens with a teacher and a weight above 0, the
    fraction f with the largest `student_entropy` (over the K and the rest, at the distillation's
    temperature); ties go to the earlier token. Their weight is divided by the fraction selected, so
    that the distillation is a mean over them. After SE-KD (Tavor et al., "Rethinking selective
    knowledge distillation", 2026, arXiv 2602.01395). The result is the same on every rank.
    """
    if config.top_entropy_fraction == 1 or "student_entropy" not in metrics:
        return config.weights if weights is None else weights
    entropy = metrics["student_entropy"]
    if weights is None:
        weights = torch.stack([torch.full_like(entropy, weight) for weight in config.weights], -1)
    learned = (weights[:, 1] > 0) & ~entropy.isnan()
    order = entropy.masked_fill(~learned, -torch.inf).argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    count = learned.sum()
    selected = (config.top_entropy_fraction * count).ceil()
    chosen = learned & (rank < selected)
    distillation = torch.where(chosen, weights[:, 1] * (count / selected), 0)
    return torch.stack([weights[:, 0].to(distillation.dtype), distillation], -1)


def combine(nll: Tensor, kd: Tensor, weights: Weights) -> Tensor:
    """sft · nll + kd_weight · kd [N]; a term of weight 0 is left out.

    Multiplying it by 0 instead would give NaN for an infinite term.
    """
    if isinstance(weights, Tensor):
        terms = torch.stack([nll, kd], -1)
        weights = weights.to(terms.dtype)
        return (torch.where(weights == 0, 0, terms) * weights).sum(-1)
    sft, kd_weight = weights
    if not kd_weight:
        return sft * nll
    return kd_weight * kd if not sft else sft * nll + kd_weight * kd
