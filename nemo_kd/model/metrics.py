"""Sums of per-token metrics over micro-batches and ranks, and their means."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from megatron.core import parallel_state

from nemo_kd.loss import KDLoss
from nemo_kd.model.config import KDTrainingConfig

# Name in the logs → in `KDLoss.metrics`; the two losses come before them.
TOKEN_METRICS = {
    "teacher_mass": "teacher_mass",
    "student_mass": "student_mass",
    "top1_agreement": "top1_teacher",
    "top1_label": "top1_label",
    "teacher_entropy": "teacher_entropy",
    "student_entropy": "student_entropy",
}
CALIBRATION_BINS = 15
NAMES = ("sft_loss", "kd_loss", *TOKEN_METRICS)


class MetricSums:
    """Sums over answer tokens; every rank calls `means`, also those that added nothing.

    calibration_error: the expected calibration error of the student's best token, Σ over 15 bins
    of |Σ (confidence - correct)| / tokens (Guo et al., "On calibration of modern neural networks",
    2017).
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.sums = torch.zeros(len(NAMES) + 1, dtype=torch.float64)  # the last counts tokens
        # Σ (confidence - correct) of the tokens of each bin of confidence
        self.calibration = torch.zeros(CALIBRATION_BINS, dtype=torch.float64)

    def add(self, result: KDLoss) -> None:
        """Add one micro-batch: sums over its answer tokens, in float64."""
        unknown = torch.full_like(result.metrics["top1_label"], torch.nan)
        tokens = [result.metrics.get(name, unknown) for name in TOKEN_METRICS.values()]
        sums = [values.detach().sum(dtype=torch.float64) for values in (result.nll, result.kd)]
        sums += [values.sum(dtype=torch.float64) for values in tokens]
        count = torch.full_like(sums[0], tokens[0].numel())
        self.sums = self.sums.to(count.device) + torch.stack([*sums, count])
        confidence = result.metrics["confidence"].double()
        bins = (confidence * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
        apart = confidence - result.metrics["top1_label"].double()
        self.calibration = self.calibration.to(count.device).index_add(0, bins, apart)

    def means(self, kd: KDTrainingConfig) -> dict[str, float]:
        """Means over all answer tokens of all data-parallel ranks, the same on every rank.

        Empty where no micro-batch had teacher rows; NaN for what needs a log-sum-exp that is not
        known. Collectives: an all-reduce over the data-parallel group, a broadcast from the last
        pipeline stage to the others.
        """
        device = torch.cuda.current_device()
        sums = torch.cat([self.calibration.to(device), self.sums.to(device)])
        torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            torch.distributed.broadcast(
                sums,
                src=parallel_state.get_pipeline_model_parallel_last_rank(),
                group=parallel_state.get_pipeline_model_parallel_group(),
            )
        if not sums[-1]:
            return {}
        calibration, sums = sums[:CALIBRATION_BINS], sums[CALIBRATION_BINS:]
        means = zip(NAMES, (sums[:-1] / sums[-1]).tolist(), strict=True)
        result = dict(means)
        result["calibration_error"] = float(calibration.abs().sum() / sums[-1])
        sft_weight, kd_weight = kd.weights
        result["loss"] = sft_weight * result["sft_loss"] + kd_weight * result["kd_loss"]
        return result


class MetricsJsonl(Callback):
    """One JSON object a training step and a validation: `metrics.jsonl` of a run's directory.

    What is not known at a step, NaN, is left out; a loss of NaN is not.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self._write(trainer, lambda name: not name.startswith(("val", "validation")))

    def on_validation_end(self, trainer: Trainer, *args: Any) -> None:
        self._write(trainer, lambda name: name.startswith(("val", "validation")))

    def _write(self, trainer: Trainer, wanted: Any) -> None:
        if trainer.global_rank:
            return
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if wanted(k)}
        metrics = {k: v for k, v in metrics.items() if not math.isnan(v) or k.endswith("loss")}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({**metrics, "step": trainer.global_step}) + "\n")
