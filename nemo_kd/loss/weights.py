"""Weights of the two losses: the same for all tokens, or per token."""

from __future__ import annotations

import torch
from torch import Tensor

Weights = tuple[float, float] | Tensor
"""(cross-entropy, distillation) for all tokens, or [N, 2] per token."""


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
