"""Metrics of training steps in Lightning: kept on the device, read back every few steps, logged.

A step adds its sums and what NeMo has logged to a list of tensors. They are copied to the host
together, after every `trainer.log_every_n_steps` steps, before a validation and in a checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from nemo_kd.loss import MassWatch
from nemo_kd.loss.finite import AT_THE_END, FiniteWatch
from nemo_kd.mcore.metrics import means_of

ANSWER_TOKENS = "answer_tokens"
NEMO_LOSS = "reduced_train_loss"
REMEDY = (
    "resume from an earlier checkpoint (exp_manager.resume_from_checkpoint), or start again in a "
    "new directory, with a smaller model.optim.lr, or trainer.precision=bf16-mixed instead of "
    "16-mixed"
)
"""For a loss that is not finite."""
VALIDATION = ("val", "validation")
"""Beginnings of the names that a validation logs."""


@dataclass(frozen=True)
class StepSums:
    """What a training step measured, on the device."""

    sums: torch.Tensor
    """[SIZE]: `MetricSums.reduced`."""

    answer_tokens: torch.Tensor
    """Answer tokens of the global batch, a scalar."""

    distils: bool
    """Whether the divergence has a weight above 0."""

    settings: Mapping[str, float] = field(default_factory=dict)
    """Settings of the loss that change from step to step."""


@dataclass(frozen=True)
class _Unread:
    """A step that was not read back yet, and the scalars that NeMo logged in it."""

    number: int
    own: StepSums
    logged: Mapping[str, torch.Tensor]

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.own.sums, self.own.answer_tokens, *self.logged.values()]

    def scalars(self, values: Iterator[torch.Tensor]) -> dict[str, float]:
        """Take the scalars from the values read back of `tensors`."""
        return {name: float(next(values)) for name in self.logged}


class StepMetrics(Callback):
    """Log the metrics of each training step, and write them to `metrics.jsonl`, on rank 0.

    The file has one JSON object per training step and per validation. A line has only what was
    measured: no losses without answer tokens, no teacher metrics without a teacher. A loss that is
    NaN is written as NaN. Steps are written when they are read back; loggers get the last of them.
    `tokens_per_s` is that of the steps that are read back together, without validations.

    `path`: None writes no file. The model has a `StepSums` as `step_sums`.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._unread: list[_Unread] = []
        self._names: list[str] = []  # logged at the last time
        self._clock: float | None = None  # when the steps that are unread began
        self._watch: MassWatch | None = None
        self._finite = FiniteWatch(_print, REMEDY)

    def on_train_batch_start(self, *args: Any) -> None:
        if self._clock is None:
            self._clock = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_rank:
            return
        nemos = {name: x for name, x in _logged(trainer).items() if name not in self._names}
        self._unread.append(_Unread(trainer.global_step, pl_module.step_sums, nemos))
        if trainer._logger_connector.should_update_logs:
            self._log(trainer, pl_module, self._read(pl_module))
            self._finite.refuse()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._read(pl_module)
        self._clock = None  # a validation's time is not part of a training step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning's check before the first step (`num_sanity_val_steps`) is no validation.
        if not trainer.global_rank and not trainer.sanity_checking:
            metrics = trainer.callback_metrics.items()
            values = {name: float(value) for name, value in metrics if name.startswith(VALIDATION)}
            self._write([{**values, "step": trainer.global_step}])

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._read(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._read(pl_module)
        self._finite.refuse(AT_THE_END)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        with contextlib.suppress(RuntimeError):  # a failed device must not hide its error
            self._read(pl_module)

    def _read(self, pl_module: Any) -> dict[str, float]:
        """Read back and write the unread steps; return our metrics of the last one."""
        unread, self._unread = self._unread, []
        if not unread:
            return {}
        values = iter(_to_host([tensor for step in unread for tensor in step.tensors]))
        read = [(step, next(values), float(next(values)), step.scalars(values)) for step in unread]
        now = time.perf_counter()
        assert self._clock is not None  # a step was begun
        speed = sum(tokens for _, _, tokens, _ in read) / (now - self._clock)
        self._clock = now
        lines, means = [], {}
        for step, sums, tokens, logged in read:
            means = {**means_of(sums), **step.own.settings}
            if step.own.distils and "teacher_mass" in means:
                self._warn_of_mass(means["teacher_mass"], pl_module.kd_schedule.temperature)
            means.update({ANSWER_TOKENS: tokens, "tokens_per_s": speed})
            if tokens:
                self._finite.note(step.number, logged.get(NEMO_LOSS, 0.0))
            else:
                logged.pop(NEMO_LOSS, None)
            lines.append({**logged, **means, "step": step.number})
        self._write(lines)
        return means

    def _log(self, trainer: Trainer, pl_module: Any, means: Mapping[str, float]) -> None:
        """Log the means of this step; its values, and no others, get to Lightning's loggers."""
        forget(trainer, self._names)
        self._names = list(means)
        for name, value in means.items():
            pl_module.log(name, value, batch_size=1, rank_zero_only=True)
        if not means[ANSWER_TOKENS]:
            forget_loss_without_tokens(trainer)

    def _warn_of_mass(self, mass: float, temperature: float) -> None:
        self._watch = self._watch or MassWatch(temperature)
        # NeMo redirects Python's warnings into its own log; this one must be visible.
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self._watch(mass)
        for warning in caught:
            _print(f"WARNING: {warning.message}")

    def _write(self, lines: Sequence[Mapping[str, float]]) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


def _print(text: str) -> None:
    """Print a line on standard error; only rank 0 reads the losses."""
    print(text, file=sys.stderr, flush=True)


def _logged(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return the scalars that are logged for this training step, without waiting for the device.

    Lightning's `callback_metrics` would read back those of the progress bar.
    """
    results = trainer._results
    items = results.valid_items() if results is not None else ()
    each = {metric.meta.name: metric._forward_cache for _, metric in items}
    return {name: x for name, x in each.items() if isinstance(x, torch.Tensor)}


def _to_host(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copy float tensors to the CPU, in float64, one dimension and one copy from the device."""
    device = tensors[0].device
    flat = torch.cat([x.detach().to(device, torch.float64).flatten() for x in tensors]).cpu()
    return list(flat.split([x.numel() for x in tensors]))


def without_loss_of_no_tokens(loss: torch.Tensor, answer_tokens: torch.Tensor) -> torch.Tensor:
    """Return a step's loss, NaN if the step has no answer token; its own value would be 0.

    That would be the best value of a checkpoint's monitor.
    """
    return torch.where(answer_tokens == 0, math.nan, loss)


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
    """Remove NeMo's training loss of a step without answer tokens: a logger needs no such point."""
    forget(trainer, [NEMO_LOSS])
    trainer.callback_metrics[NEMO_LOSS] = torch.tensor(math.nan)
