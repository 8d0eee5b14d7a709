"""Metrics in Lightning: their file, and values that a step must not repeat."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

ANSWER_TOKENS = "answer_tokens"
NEMO_LOSS = "reduced_train_loss"


class MetricsJsonl(Callback):
    """Write `metrics.jsonl`: one JSON object per training step and per validation.

    A line has only what was measured: no losses without answer tokens, no teacher metrics without a
    teacher. A loss that is NaN is written as NaN.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self._write(trainer, lambda name: not name.startswith(("val", "validation")))

    def on_validation_end(self, trainer: Trainer, *args: Any) -> None:
        self._write(trainer, lambda name: name.startswith(("val", "validation")))

    def _write(self, trainer: Trainer, selected: Callable[[str], bool]) -> None:
        if trainer.global_rank:
            return
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if selected(k)}
        if metrics.get(ANSWER_TOKENS) == 0:
            metrics.pop(NEMO_LOSS, None)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({**metrics, "step": trainer.global_step}) + "\n")


def forget(trainer: Trainer, names: Collection[str]) -> None:
    """Remove from Lightning the values logged under these names in earlier training steps.

    Lightning passes the last value of each name to loggers, callbacks and progress bars, so a step
    that does not log a name would repeat an earlier step's value.
    """
    results = trainer._results
    for key in [key for key, logged in (results or {}).items() if logged.meta.name in names]:
        del results[key]
    for kept in (trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics):
        for name in names:
            kept.pop(name, None)


def forget_loss_without_tokens(trainer: Trainer) -> None:
    """Remove NeMo's training loss of a step without answer tokens, which would be 0.

    It would be a wrong point in a curve, and the best value of a checkpoint's monitor.
    """
    forget(trainer, [NEMO_LOSS])
    trainer.callback_metrics[NEMO_LOSS] = torch.tensor(math.nan)
