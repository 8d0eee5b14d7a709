"""Losses of other packages, with logits [N, V] or hidden [N, H]; a ready one per name.

`optional` gives the reason in place of one that cannot be used here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import megatron
from benchmarks.gpu.timing import Step, reason
from nemo_kd.loss import TopK

Loss = Callable[[Tensor], Tensor]
"""logits [N, V] → the mean."""
Steps = dict[str, Step | str]
PROBABLE = -30.0
"""Log-probability before normalization of what a dense teacher has beside its K ids."""


def optional(name: str, make: Callable[[], Step]) -> Steps:
    """{name: the step, or why there is none}."""
    try:
        return {name: make()}
    except Exception as error:  # whatever another package's import raises
        return {name: reason(error)}


def of_logits(labels: Tensor, teacher: TopK) -> dict[str, Callable[[], Loss]]:
    return {
        "Megatron's cross-entropy": partial(megatron_loss, labels),
        "Megatron's fused cross-entropy": partial(megatron_fused, labels),
        "Megatron's offline distillation + cross-entropy": partial(
            megatron_distillation, labels, teacher
        ),
        "Liger's cross-entropy": partial(liger, labels),
        "Liger's JSD of a dense teacher": partial(liger_jsd, teacher),
    }


def megatron_loss(labels: Tensor) -> Loss:
    megatron.start(labels.device.type)
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    return lambda z: vocab_parallel_cross_entropy(z, labels).mean()


def megatron_fused(labels: Tensor) -> Loss:
    megatron.start(labels.device.type)
    from megatron.core import parallel_state
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    group = parallel_state.get_tensor_model_parallel_group()
    return lambda z: fused_vocab_parallel_cross_entropy(
        z.unsqueeze(1), labels.unsqueeze(1), group
    ).mean()


def megatron_distillation(labels: Tensor, teacher: TopK) -> Loss:
    """Megatron-LM's `topk_kl_div`, from 0.19 on, and its cross-entropy."""
    cross_entropy = megatron_loss(labels)
    from megatron.core import parallel_state
    from megatron.training.distillation.cached_logits_loss import topk_kl_div

    group = parallel_state.get_tensor_model_parallel_group()
    assert teacher.logsumexp is not None
    log_p = (teacher.logits - teacher.logsumexp.unsqueeze(-1)).unsqueeze(1)  # [S, B, K]
    ids = teacher.ids.unsqueeze(1)

    def loss(z: Tensor) -> Tensor:
        nll = cross_entropy(z)
        kd = topk_kl_div(z.unsqueeze(1), log_p, ids, 1, 0, group, True)
        return 0.5 * nll + 0.5 * kd.mean()

    return loss


def liger(labels: Tensor) -> Loss:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    loss = LigerCrossEntropyLoss()
    return lambda z: loss(z * 1, labels)


def liger_jsd(teacher: TopK) -> Loss:
    """The dense log-probabilities of the teacher are made in each step."""
    from liger_kernel.transformers import LigerJSD

    loss = LigerJSD()
    return lambda z: loss(z.float().log_softmax(-1), dense_teacher(teacher, z))


def dense_teacher(teacher: TopK, z: Tensor) -> Tensor:
    """Log-probabilities [N, V] in float32, nearly all of it on the teacher's ids."""
    target = torch.full_like(z, PROBABLE, dtype=torch.float32, requires_grad=False)
    return target.scatter_(1, teacher.ids, teacher.logits).log_softmax(-1)


def of_hidden(hidden: Tensor, weight: Tensor, labels: Tensor) -> dict[str, Any]:
    """Functions without arguments → the loss of hidden [N, H] and weight [V, H]."""

    def cross_entropy() -> Callable[[], Tensor]:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss()
        return lambda: loss(weight, hidden, labels)

    def jsd() -> Callable[[], Tensor]:
        from liger_kernel.transformers import LigerFusedLinearJSD

        loss = LigerFusedLinearJSD()
        teacher = hidden.detach().flip(0), weight.detach()
        return lambda: loss(hidden, weight, *teacher, labels)

    return {
        "Liger's fused linear cross-entropy": cross_entropy,
        "Liger's fused linear JSD, with the teacher's LM head": jsd,
    }
