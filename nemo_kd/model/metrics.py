"""Sums of per-token metrics over micro-batches and ranks, and their means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from megatron.core import parallel_state

from nemo_kd.loss import KDLoss
from nemo_kd.model.config import KDTrainingConfig


class MetricSums:
    """Sums over answer tokens; every rank calls `means`, also those that added nothing."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.names: tuple[str, ...] = ()
        self.sums: torch.Tensor | None = None
        self.answer_tokens = 0

    def add(self, result: KDLoss) -> None:
        """Add one micro-batch: sums over its answer tokens, in float64."""
        values = {"sft_loss": result.nll, "kd_loss": result.kd, **result.metrics}
        self.names = tuple(values)
        count = next(iter(result.metrics.values())).numel()
        sums = [value.detach().double().sum() for value in values.values()]
        part = torch.stack([*sums, torch.as_tensor(count, dtype=torch.float64, device=sums[0].device)])
        self.sums = part if self.sums is None else self.sums + part

    def means(self, kd: KDTrainingConfig) -> dict[str, float]:
        """Means over all answer tokens of all data-parallel ranks, the same on every rank.

        Collectives: one all-reduce over the data-parallel group on the last stage, one broadcast
        down the pipeline.
        """
        holder: list[Any] = [self.names, self.sums]
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            torch.distributed.broadcast_object_list(
                holder,
                src=parallel_state.get_pipeline_model_parallel_last_rank(),
                group=parallel_state.get_pipeline_model_parallel_group(),
            )
        names, sums = holder
        if sums is None:
            return {}
        torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        self.answer_tokens = int(sums[-1])
        means = (sums[:-1] / max(self.answer_tokens, 1)).tolist()
        result = dict(zip(names, means, strict=True))
        result["loss"] = kd.sft_weight * result["sft_loss"] + kd.kd_weight * result["kd_loss"]
        return result


class MetricsJsonl(Callback):
    """One JSON object a training step and a validation, in `metrics.jsonl` of the run's directory."""

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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({**metrics, "step": trainer.global_step}) + "\n")
