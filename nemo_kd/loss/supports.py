"""The support of the divergence: two small distributions, the teacher's and the student's.

                teacher                              student
    topk        softmax over the K                   softmax over the same K
    vocab       softmax over the K, 0 elsewhere      softmax over the vocabulary
    bucket      exp(t / T - L), the rest in one      softmax over the vocabulary, the rest in one

`vocab` and `bucket` have K + 1 points, the last of which is everything outside the K. All give
log-probabilities [N, K] or [N, K + 1], normalised, with `log_floor` instead of -inf.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

SUPPORTS: Mapping[str, str] = MappingProxyType(
    {
        "bucket": "exact probabilities; everything outside the K is one more point",
        "vocab": "the teacher's K renormalised, the student over the vocabulary",
        "topk": "both renormalised over the K",
    }
)


MIN_TAIL_PROB = 1e-12
"""Lower bound of the teacher's probability outside its K ids, unless K = V."""


def log_floor(dtype: torch.dtype) -> float:
    """A log-probability whose exponential is 0, finite so that differences of two are not NaN."""
    return torch.finfo(dtype).min / 4


def log_softmax(values: Tensor) -> Tensor:
    """log softmax [N, J] with `log_floor` for -inf, where the gradient is zero."""
    return torch.log_softmax(values, -1).clamp_min(log_floor(values.dtype))


def teacher_bucket(
    logits: Tensor, logsumexp: Tensor, temperature: float, dtype: torch.dtype
) -> Tensor:
    """log p [N, K + 1] of t / T - L [N, K] and of the remainder log(1 - Σ exp(t / T - L)).

    In float64, which resolves a remainder of 1e-9 if the inputs do. Rounding of stored logits can
    give a mass of 1 or more, so the remainder is at least `MIN_TAIL_PROB`: with 0 a reverse KL
    would be infinite.
    """
    log_p = logits.double() / temperature - logsumexp.double().unsqueeze(-1)
    mass = torch.logsumexp(log_p, -1, keepdim=True)
    rest = torch.log((-torch.expm1(mass)).clamp_min(MIN_TAIL_PROB))  # [N, 1]
    normal = torch.log_softmax(torch.cat([log_p, rest], -1), -1)
    return normal.to(dtype).clamp_min(log_floor(dtype))


def student_bucket(picked: Tensor, rest: Tensor, temperature: float) -> Tensor:
    """log q [N, K + 1] from the logits at the K and rest [N] = log Σ outside of exp(z / T).

    `rest` is summed on its own, not as 1 - mass, so that small values of both keep their digits.
    """
    return log_softmax(torch.cat([picked / temperature, rest.unsqueeze(-1)], -1))


def teacher_topk(logits: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """log p [N, K] of the softmax over the K."""
    return log_softmax(logits.to(dtype) / temperature)


def with_empty_rest(log_p: Tensor) -> Tensor:
    """[N, K] → [N, K + 1]: append probability 0 outside the K (the teacher of `vocab`)."""
    return torch.cat([log_p, torch.full_like(log_p[:, :1], log_floor(log_p.dtype))], -1)
