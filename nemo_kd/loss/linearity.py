"""Which settings let random draws from the teacher be right on average.

    E[p_hat] = p  and  g linear   =>   E[g(p_hat)] = g(p)

`g` is the gradient of the distillation, `p_hat` the shares of the ids that were drawn. So a loss
may be trained on draws exactly if its gradient is linear in the teacher's probabilities, with
everything that enters it: the divergence, what the student is normalised over, the temperature,
the choice of positions. Rather than a list of such settings, the loss itself is tried.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from nemo_kd.loss.config import KDConfig
from nemo_kd.loss.objective import sft_kd_loss
from nemo_kd.loss.topk import TopK

TOKENS = 4096
"""Enough that a share of the positions below 1 leaves some out."""
VOCABULARY, PADDING = 8, 2
SHARES = ((0.75, 0.25, 0.0), (0.0, 0.75, 0.25))
"""Two teachers on three ids of each token; their mean has all three."""


def nonlinear_settings(config: KDConfig) -> list[str]:
    """Names of the fields that make the gradient nonlinear in the teacher; empty: it is linear.

    A field is named if its value alone does so beside the defaults, and all that are not defaults
    are if only their combination does.
    """
    if _is_linear(config):
        return []
    changed = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(KDConfig)
        if field.name not in ("alpha", "sft_weight", "kd_weight")
        and getattr(config, field.name) != field.default
    }
    alone = [name for name, value in changed.items() if not _is_linear(KDConfig(**{name: value}))]
    return alone or list(changed)


def _is_linear(config: KDConfig) -> bool:
    """Whether the gradient at the mean of two teachers is the mean of their gradients."""
    kd_alone = dataclasses.replace(config, alpha=1.0, sft_weight=None, kd_weight=None)
    shares = torch.tensor(SHARES, dtype=torch.float64)  # [2, 3]
    first, second, at_mean = (_gradient(kd_alone, p) for p in (*shares, shares.mean(0)))
    return torch.allclose(at_mean, (first + second) / 2, rtol=1e-6, atol=1e-9)


def _gradient(config: KDConfig, shares: Tensor) -> Tensor:
    """[N, V] for a teacher with these `shares` [3] of three ids at each token."""
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(TOKENS, VOCABULARY, generator=generator).argsort(-1)
    ids = order[:, :3].masked_fill(shares == 0, -1)
    columns = VOCABULARY + PADDING
    z = 2 * torch.randn(TOKENS, columns, dtype=torch.float64, generator=generator)
    z.requires_grad_()
    teacher = TopK(shares.log().expand(TOKENS, 3), ids, z.new_zeros(TOKENS))
    result = sft_kd_loss(z, order[:, 0], teacher, config, vocab_size=VOCABULARY)
    (gradient,) = torch.autograd.grad(result.loss.sum(), z)
    return gradient
