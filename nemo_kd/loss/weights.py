"""How the two losses of a token are weighed: all alike, by sample, or at selected positions."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_kd.loss.config import KDConfig

Weights = tuple[float, float] | Tensor
"""(cross-entropy, distillation) for all tokens, or [N, 2]."""


def token_weights(config: KDConfig, weights: Tensor | None, metrics: dict[str, Tensor]) -> Weights:
    """The configuration's weights, or `weights` [N, 2], at the selected positions.

    `top_entropy(share)`: among the tokens that a teacher is learned at, the share with the largest
    `student_entropy` of `metrics` (over the K and the rest, at the temperature of the
    distillation); ties to the earlier. Their weight grows so that the distillation is a mean over
    them. After SE-KD (Tavor et al., "Rethinking selective knowledge distillation", 2026, arXiv
    2602.01395). Nothing of it depends on the rank.
    """
    if config.share == 1 or "student_entropy" not in metrics:
        return config.weights if weights is None else weights
    entropy = metrics["student_entropy"]
    if weights is None:
        weights = entropy.new_tensor(config.weights).expand(len(entropy), 2)
    learned = (weights[:, 1] > 0) & ~entropy.isnan()
    order = entropy.masked_fill(~learned, -torch.inf).argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    count = learned.sum()
    selected = (config.share * count).ceil()
    chosen = learned & (rank < selected)
    distillation = torch.where(chosen, weights[:, 1] * (count / selected), 0)
    return torch.stack([weights[:, 0].to(distillation.dtype), distillation], -1)


def combine(nll: Tensor, kd: Tensor, weights: Weights) -> Tensor:
    """sft · nll + kd_weight · kd [N]; a weight of 0 leaves its term out altogether.

    So that 0 · inf does not spoil the other.
    """
    if isinstance(weights, Tensor):
        terms = torch.stack([nll, kd], -1)
        weights = weights.to(terms.dtype)
        return (torch.where(weights == 0, 0, terms) * weights).sum(-1)
    sft, kd_weight = weights
    if not kd_weight:
        return sft * nll
    return kd_weight * kd if not sft else sft * nll + kd_weight * kd
