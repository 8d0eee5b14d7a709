"""Divergences between two distributions on a few points, one small pure function each.

All take log-probabilities `log_p` (teacher, no gradient) and `log_q` (student) [N, J], normalised
over J, in nats, and return [N]. No entry is -inf: `supports` clamps them to a finite floor at which
the probability is zero, so that 0 · log 0 is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = Σ p (log p - log q): the student covers everything that the teacher does.

    Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", 2015.
    """
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || p): the student concentrates where the teacher is likely.

    Gu et al., "MiniLLM", 2024.
    """
    return forward_kl(log_q, log_p)


def jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.

    Agarwal et al., "On-policy distillation of language models" (GKD), 2024.
    """
    log_m = _mixture(log_p, log_q, beta)
    return beta * forward_kl(log_p, log_m) + (1 - beta) * forward_kl(log_q, log_m)


def skew_forward_kl(log_p: Tensor, log_q: Tensor, skew: float) -> Tensor:
    """KL(p || skew p + (1 - skew) q): bounded by -log skew.

    Ko et al., "DistiLLM", 2024.
    """
    return forward_kl(log_p, _mixture(log_p, log_q, skew))


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, skew: float) -> Tensor:
    """KL(q || (1 - skew) p + skew q): bounded by -log skew. DistiLLM, as above."""
    return forward_kl(log_q, _mixture(log_q, log_p, skew))


def _mixture(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """log(weight a + (1 - weight) b)."""
    return torch.logaddexp(log_a + math.log(weight), log_b + math.log1p(-weight))


@dataclass(frozen=True)
class Divergence:
    """A divergence, the configuration's field that it takes, and where it is infinite."""

    function: Callable[..., Tensor]
    parameter: Literal["beta", "skew"] | None = None
    needs_teacher_everywhere: bool = False
    """Infinite wherever the student has mass and the teacher has none (support `vocab`)."""
    in_double: bool = False
    """Computed in float64: its gradient multiplies the student's probability by a difference of
    logarithms, whose rounding in float32 would be visible."""


DIVERGENCES: Mapping[str, Divergence] = MappingProxyType(
    {
        "forward_kl": Divergence(forward_kl),
        "reverse_kl": Divergence(reverse_kl, needs_teacher_everywhere=True, in_double=True),
        "jsd": Divergence(jsd, parameter="beta"),
        "skew_forward_kl": Divergence(skew_forward_kl, parameter="skew"),
        "skew_reverse_kl": Divergence(skew_reverse_kl, parameter="skew"),
    }
)
