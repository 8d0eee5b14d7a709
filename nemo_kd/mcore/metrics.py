"""Sums of per-token metrics over micro-batches and ranks, and their means."""

from __future__ import annotations

import torch
from megatron.core import parallel_state

from nemo_kd.loss import KDLoss

# Name in the logs → in `KDLoss.metrics`; the losses come before them.
TOKEN_METRICS = {
    "teacher_mass": "teacher_mass",
    "student_mass": "student_mass",
    "top1_agreement": "top1_teacher",
    "top1_label": "top1_label",
    "teacher_entropy": "teacher_entropy",
    "student_entropy": "student_entropy",
}
OF_THE_TEACHER = ("teacher_mass", "teacher_entropy")
"""Metrics that need the teacher's log-sum-exp."""
CALIBRATION_BINS = 15
NAMES = ("loss", "sft_loss", "kd_loss", *TOKEN_METRICS)
SIZE = CALIBRATION_BINS + 2 * len(NAMES)


def token_sums(result: KDLoss) -> torch.Tensor:
    """Return Σ over the answer tokens of a micro-batch and their numbers, [2, NAMES] float64.

    Metrics that need a teacher are summed and counted only at tokens that have one.
    """
    metrics = result.metrics
    unknown = torch.full_like(metrics["top1_label"], torch.nan)
    values = torch.stack([metrics.get(name, unknown) for name in TOKEN_METRICS.values()])
    known = ~values.isnan()
    losses = [x.detach().sum(dtype=torch.float64) for x in (result.loss, result.nll, result.kd)]
    sums = [*losses, *values.nan_to_num(0).sum(-1, dtype=torch.float64)]
    learned = ~metrics.get("student_mass", unknown).isnan()
    tokens = torch.full_like(losses[0], len(unknown))
    counts = [tokens, tokens, learned.sum(), *known.sum(-1)]
    return torch.stack([torch.stack(sums), torch.stack(counts).double()])


class MetricSums:
    """Sums of per-token metrics; every rank calls `means`, even if it added nothing.

    calibration_error: the expected calibration error of the student's best token, Σ over 15 bins
    of |Σ (confidence - correct)| / tokens (Guo et al., "On calibration of modern neural networks",
    2017).
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        # On the device of the first tokens. Row 0: sums; row 1: the number of tokens in each sum.
        self.sums: torch.Tensor | None = None  # [2, NAMES]
        # Σ (confidence - correct) of the tokens of each bin of confidence
        self.calibration: torch.Tensor | None = None  # [CALIBRATION_BINS]

    def add(self, result: KDLoss) -> None:
        """Add one micro-batch."""
        metrics, both = result.metrics, token_sums(result)
        confidence = metrics["confidence"].double()
        bins = (confidence * CALIBRATION_BINS).long().clamp(0, CALIBRATION_BINS - 1)
        apart = both.new_zeros(CALIBRATION_BINS)
        apart.index_add_(0, bins, confidence - metrics["top1_label"].double())
        self.sums = both if self.sums is None else self.sums + both
        self.calibration = apart if self.calibration is None else self.calibration + apart

    def means(self) -> dict[str, float]:
        """Means over all answer tokens of all data-parallel ranks, the same on every rank.

        Metrics without any token are left out: all of them without answer tokens, those that need a
        teacher without one. The host waits once. Collectives: as `reduced`.
        """
        return means_of(self.reduced().cpu())

    def reduced(self) -> torch.Tensor:
        """Sums over all ranks [SIZE] float64, from which `means_of` computes the means.

        The host does not wait.
        Collectives: an all-reduce over the data- and context-parallel ranks, a broadcast from the
        last pipeline stage to the others.
        """
        if self.sums is None or self.calibration is None:
            flat = torch.zeros(SIZE, dtype=torch.float64, device=torch.cuda.current_device())
        else:
            flat = torch.cat([self.calibration, self.sums.flatten()])
        # Each context-parallel rank has added only the tokens of its part of each sequence.
        everyone = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(flat, group=everyone)
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            torch.distributed.broadcast(
                flat,
                src=parallel_state.get_pipeline_model_parallel_last_rank(),
                group=parallel_state.get_pipeline_model_parallel_group(),
            )
        return flat


def means_of(flat: torch.Tensor) -> dict[str, float]:
    """Return the means of `MetricSums.reduced` [SIZE], copied to the CPU."""
    calibration = flat[:CALIBRATION_BINS]
    sums, counts = flat[CALIBRATION_BINS:].view(2, -1)
    if not counts[0]:
        return {}
    means = zip(NAMES, (sums / counts).tolist(), counts.tolist(), strict=True)
    result = {name: mean for name, mean, count in means if count}
    result["calibration_error"] = float(calibration.abs().sum() / counts[0])
    return result
