"""Early stopping: why it ended a run, and whether what it and the checkpoints monitor exists."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.trainer.states import TrainerFn

from nemo_kd.errors import NemoKDError
from nemo_kd.nemo.metrics import VALIDATION


def stop_reason(trainer: Trainer) -> str:
    """Return why early stopping ends this run; "" if it does not."""
    within = (trainer.min_steps or 0) <= trainer.global_step < trainer.max_steps
    if not (trainer.should_stop and within):
        return ""
    for callback in trainer.early_stopping_callbacks:
        value = trainer.callback_metrics.get(callback.monitor)
        reason = "" if value is None else reason_of(callback, float(value))
        if reason:
            return reason
    return ""


def out_of_time(trainer: Trainer) -> bool:
    """Whether the time of `exp_manager.max_time_per_run` is over."""
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]
    left = [timer.time_remaining() for timer in timers]
    return any(x is not None and x <= 0 for x in left)


def reason_of(callback: EarlyStopping, value: float) -> str:
    """Return the condition of Lightning's callback that holds after a validation with `value`."""
    better = callback.order_dict[callback.mode]
    threshold, divergence = callback.stopping_threshold, callback.divergence_threshold
    if callback.check_finite and not math.isfinite(value):
        return f"{callback.monitor} is {value}"
    if threshold is not None and _better(callback, value, threshold):
        return f"{callback.monitor} is {value:.4f}, {better} stopping_threshold={threshold}"
    if divergence is not None and _better(callback, -value, -divergence):
        return f"{callback.monitor} is {value:.4f}, beyond divergence_threshold={divergence}"
    if 0 < callback.wait_count >= callback.patience:
        count = callback.wait_count
        validations = "the last validation" if count == 1 else f"the last {count} validations"
        return (
            f"{callback.monitor} did not improve on {float(callback.best_score):.4f} by more than "
            f"min_delta={abs(callback.min_delta)} in {validations}"
        )
    return ""


def _better(callback: EarlyStopping, one: float, other: float) -> bool:
    return one < other if callback.mode == "min" else one > other


def keep_patience(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Keep the command's patience when resuming: Lightning would restore the checkpoint's."""
    for callback in trainer.early_stopping_callbacks:
        state = checkpoint.get("callbacks", {}).get(callback.state_key)
        if state:
            state["patience"] = callback.patience


class MonitorCheck(Callback):
    """Refuse, at the first validation, a monitor that is not among the logged metrics.

    Early stopping with NeMo's `strict=false` would ignore it and never stop. Insert before the
    callbacks that it checks.
    """

    def __init__(self) -> None:
        self._found: set[str] = set()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        for block, monitor in _monitors(trainer):
            if monitor in trainer.callback_metrics:
                self._found.add(monitor)
            elif monitor not in self._found and _is_due(trainer, monitor):
                names = sorted(n for n in trainer.callback_metrics if n.startswith(VALIDATION))
                raise NemoKDError(
                    f"exp_manager.{block}.monitor={monitor} is not a metric of this run; choose "
                    f"one of {', '.join(names)}"
                )


def _monitors(trainer: Trainer) -> Iterator[tuple[str, str]]:
    """Yield the blocks of `exp_manager` and the metrics that their callbacks monitor."""
    for callback in trainer.early_stopping_callbacks:
        yield "early_stopping_callback_params", callback.monitor
    for callback in trainer.checkpoint_callbacks:
        monitor = getattr(callback, "monitor", None)
        if monitor and getattr(callback, "save_top_k", 0):
            yield "checkpoint_callback_params", monitor


def _is_due(trainer: Trainer, monitor: str) -> bool:
    """Whether a metric must have been logged: those of training are, every few steps."""
    return monitor.startswith(VALIDATION) or trainer.global_step >= trainer.log_every_n_steps
