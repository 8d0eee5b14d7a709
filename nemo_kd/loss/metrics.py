"""Metrics of the distillation, one value per token, from tensors that the loss already has."""

from __future__ import annotations

import warnings

from torch import Tensor

LOW_MASS = 0.9


def token_metrics(
    log_p: Tensor | None, log_q: Tensor, student: Tensor, teacher: Tensor
) -> dict[str, Tensor]:
    """One detached [N] each, at the training temperature, over the K and the rest.

    `log_p`, `log_q` [N, K + 1]: teacher's and student's `bucket` (None where the teacher's
    log-sum-exp is not known: its two metrics are then left out); `student`, `teacher` [N, K]:
    logits at the K, the student's relative to its largest anywhere.

    teacher_mass, student_mass: the probability inside the K. teacher_entropy, student_entropy:
    -Σ p log p over the K + 1 points, nats. top1_teacher: 1 where the teacher's best token is the
    student's best.
    """
    at_best = student.gather(-1, teacher.argmax(-1, keepdim=True)).squeeze(-1)
    metrics = {
        "student_mass": log_q[:, :-1].exp().sum(-1),
        "student_entropy": _entropy(log_q),
        "top1_teacher": (at_best >= 0).to(log_q.dtype),
    }
    if log_p is not None:
        metrics["teacher_mass"] = log_p[:, :-1].exp().sum(-1)
        metrics["teacher_entropy"] = _entropy(log_p)
    return {name: value.detach() for name, value in metrics.items()}


class MassWatch:
    """Warn once if the K stored tokens hold too little of the teacher's probability.

    A store whose K tokens hold 97% of the mass at temperature 1 may hold 3% at 4: the bucket then
    says almost nothing about the teacher. The caller passes the mean that it logs.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.warned = False

    def __call__(self, teacher_mass: float) -> None:
        """`teacher_mass`: the mean over some tokens of the metric of that name."""
        if teacher_mass < LOW_MASS and not self.warned:
            self.warned = True
            warnings.warn(
                f"The teacher's stored tokens hold {teacher_mass:.3f} of its probability "
                f"at temperature {self.temperature:g} (below {LOW_MASS}): the student mostly "
                "learns how much probability lies outside them. Lower the temperature, or dump a "
                "larger K.",
                stacklevel=2,
            )


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(-1)
