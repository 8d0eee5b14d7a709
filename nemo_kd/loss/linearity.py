"""Determine whether random draws from the teacher give an unbiased gradient.

    E[p_hat] = p  and  g linear   =>   E[g(p_hat)] = g(p)

`g` is the gradient of the distillation, `p_hat` the frequencies of the drawn ids. So a loss
may be trained on draws exactly if its gradient is linear in the teacher's probabilities, with
everything that enters it: the divergence, the support, the temperature.
The loss itself is tested with two teachers and their mean; no list of settings is needed.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import torch
from torch import Tensor

from nemo_kd.loss.config import KDConfig
from nemo_kd.loss.shard import VocabShard
from nemo_kd.loss.terms import token_losses
from nemo_kd.topk import TopK

TOKENS = 64
VOCABULARY, PADDING = 8, 2
SHARES = ((0.75, 0.25, 0.0), (0.0, 0.75, 0.25))
"""Probabilities of three ids for each of two teachers; the mean has all three ids."""


@lru_cache(maxsize=64)
def nonlinear_settings(config: KDConfig) -> tuple[str, ...]:
    """Names of the fields that make the gradient nonlinear in the teacher; empty: it is linear.

    A field is named if its value makes it nonlinear with all others at their defaults; if only the
    combination does, every field that is not at its default is named.
    """
    if _is_linear(config):
        return ()
    changed = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(KDConfig)
        if field.name not in ("alpha", "sft_weight", "kd_weight")
        and getattr(config, field.name) != field.default
    }
    # A divergence's parameter has no effect without it.
    settings = {name: value for name, value in changed.items() if name not in ("beta", "skew")}
    alone = (name for name, value in settings.items() if not _is_linear(KDConfig(**{name: value})))
    return tuple(alone) or tuple(changed)


def _is_linear(config: KDConfig) -> bool:
    """Whether the gradient at the mean of two teachers is the mean of their gradients."""
    kd_alone = dataclasses.replace(config, alpha=1.0, sft_weight=None, kd_weight=None)
    with torch.inference_mode(False), torch.enable_grad():
        shares = torch.tensor(SHARES, dtype=torch.float64, device="cpu")  # [2, 3]
        first, second, at_mean = (_gradient(kd_alone, p) for p in (*shares, shares.mean(0)))
    return torch.allclose(at_mean, (first + second) / 2, rtol=1e-6, atol=1e-9)


def _gradient(config: KDConfig, shares: Tensor) -> Tensor:
    """[N, V] for a teacher with these `shares` [3] of three ids at each token."""
    generator = torch.Generator("cpu").manual_seed(0)
    order = torch.rand(TOKENS, VOCABULARY, generator=generator, device="cpu").argsort(-1)
    columns = VOCABULARY + PADDING
    z = torch.randn(TOKENS, columns, generator=generator, dtype=torch.float64, device="cpu")
    z = z.mul_(2).requires_grad_()
    teacher = TopK(
        ids=order[:, :3].masked_fill(shares == 0, -1),
        logits=shares.log().expand(TOKENS, 3),
        logsumexp=z.new_zeros(TOKENS),
        temperatures=(config.temperature,),
    )
    shard = VocabShard.of(columns, None, None if config.count_padding else VOCABULARY)
    ids = torch.cat([order[:, :1], teacher.ids], -1)
    loss = token_losses(z, ids, teacher, config, shard)[0]
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    return gradient
