"""Resume a run exactly at its checkpoint, with the settings of the new command."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from nemo.collections.nlp.data.language_modeling.megatron.megatron_batch_samplers import (
    MegatronPretrainingBatchSampler,
)
from nemo.core.optim import lr_scheduler
from nemo.utils.callbacks.dist_ckpt_io import AsyncFinalizableCheckpointIO
from omegaconf import open_dict

from nemo_kd.nemo.early_stopping import keep_patience, stop_reason
from nemo_kd.nemo.record import CHECKPOINT_KEY, METRICS, STEPS_KEY, STOPPED_EARLY, VALIDATED, Record

SCHEDULE_PROGRESS = ("last_epoch", "_step_count")
GROUP_STATE = ("params", "step")
"""Entries of an optimizer's parameter group that are state, not settings."""


class WholeRunBatchSampler(MegatronPretrainingBatchSampler):
    """NeMo's sampler, whose length is the number of batches of the complete run.

    The length of NeMo's own sampler counts only the remaining batches. Lightning also counts the
    batches of earlier starts, so it would end the epoch early and restart at the first samples.
    `batches_done`: number of batches of earlier starts, which may have had another size.
    """

    def __init__(self, *arguments: Any, batches_done: int = 0, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.batches_done = batches_done

    def __len__(self) -> int:
        full, rest = divmod(self.total_samples - self.consumed_samples, self.global_batch_size)
        return self.batches_done + full + bool(rest and not self.drop_last)


class ResumedLoop(_TrainingEpochLoop):
    """Lightning's loop over steps, which validates after the same steps as a run without a stop.

    NeMo's own loop leaves out the validation of the step at which a run resumes, even if its
    checkpoint was saved before that validation, and the one after the next step.

    `validate_first`: begin with the validation of the checkpoint's step.
    """

    def __init__(self, trainer: Trainer, *, validate_first: bool) -> None:
        super().__init__(trainer, trainer.min_steps, trainer.max_steps)
        self.validate_first = validate_first
        self.begun = False

    @property
    def max_steps(self) -> int:
        # Lightning would not begin if all steps are done, also if only a validation is missing.
        return self._max_steps + (self.restarting and self.validate_first and not self.begun)

    @max_steps.setter
    def max_steps(self, steps: int) -> None:
        self._max_steps = steps

    def advance(self, data_fetcher: Any) -> None:
        """Train a step, or do nothing if the next is to validate."""
        if self.restarting:
            self._restarting = self.validate_first
            # The step of TensorBoard's points: a checkpoint is saved before its step is counted.
            self._batches_that_stepped = self.global_step - self.validate_first
        super().advance(data_fetcher)
        self._restarting = False


@dataclass(frozen=True)
class Ended:
    """The end of a training: its last step, and why early stopping chose it, or ""."""

    step: int
    reason: str


def resume_exactly(trainer: Trainer, *, validate_first: bool) -> None:
    """Replace NeMo's loop over steps by a `ResumedLoop`; call after `exp_manager`."""
    trainer.fit_loop.epoch_loop = ResumedLoop(trainer, validate_first=validate_first)


class RunKeeper(Callback):
    """Save a run's record in its checkpoints; keep the new command's settings when resuming.

    Lightning restores the learning-rate schedule and the optimizer's settings from a checkpoint,
    which would silently undo a longer run or another learning rate.

    `keep_first`: never remove the checkpoint that the run resumes from, which the user has named.
    """

    def __init__(self, record: Record, *, keep_first: bool = False) -> None:
        self.record, self.keep_first = record, keep_first
        self.ended: Ended | None = None
        self._validated: int | None = None  # step of the last validation
        self._saved: tuple[int, bool] | None = None  # of the last checkpoint: step, validated
        self._metrics: dict[str, float] = {}  # of the run before it was stopped
        self._groups: list[dict[str, Any]] = []  # settings of the optimizer's parameter groups

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        note_steps(trainer, pl_module)
        done = trainer.global_step - pl_module.init_global_step
        self._saved = trainer.global_step, self._validated == trainer.global_step
        checkpoint[CHECKPOINT_KEY] = {
            **dataclasses.asdict(self.record),
            "consumed_samples": pl_module.compute_consumed_samples(done),
            STOPPED_EARLY: stop_reason(trainer),
            VALIDATED: self._saved[1],
            METRICS: {name: float(x) for name, x in trainer.callback_metrics.items()},
        }

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._validated = trainer.global_step

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._metrics = (checkpoint.get(CHECKPOINT_KEY) or {}).get(METRICS, {})
        _continue_epoch(checkpoint)
        _count_last_batch(checkpoint)
        _validate_from_the_start(checkpoint)
        keep_patience(trainer, checkpoint)
        if not all(is_planned(config.scheduler) for config in trainer.lr_scheduler_configs):
            return
        states = checkpoint["lr_schedulers"] or [{"last_epoch": checkpoint["global_step"]}]
        checkpoint["lr_schedulers"] = [
            {name: state[name] for name in SCHEDULE_PROGRESS if name in state} for state in states
        ]
        self._groups = [
            {name: value for name, value in group.items() if name not in GROUP_STATE}
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
        ]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning would never remove the checkpoint it resumed from, and NeMo refuses to choose
        # between two "last" ones at the third start.
        if (
            trainer.ckpt_path
            and not self.keep_first
            and self._is_own(trainer, Path(trainer.ckpt_path))
        ):
            trainer.ckpt_path = None
        # What checkpoints and early stopping monitor may be logged next after several steps.
        metrics = {
            name: torch.tensor(x, device=pl_module.device) for name, x in self._metrics.items()
        }
        trainer._logger_connector._callback_metrics.update(metrics)
        if not self._groups:
            return
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        for group, settings in zip(groups, self._groups, strict=True):
            group.update(settings)
        for config in trainer.lr_scheduler_configs:
            config.scheduler.last_epoch -= 1
            config.scheduler.step()  # sets the learning rate of the next step

    @staticmethod
    def _is_own(trainer: Trainer, checkpoint: Path) -> bool:
        own = getattr(trainer.checkpoint_callback, "dirpath", None)
        return own is not None and Path(own).absolute() in checkpoint.absolute().parents

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.fit_loop.epoch_loop.begun = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # NeMo's callback restores the best checkpoint and its counts next, if it is asked to.
        self.ended = Ended(trainer.global_step, stop_reason(trainer))
        note_steps(trainer, pl_module)
        step = trainer.global_step
        if self._validated == step and self._saved == (step, False):  # before the validation
            for callback in trainer.checkpoint_callbacks:
                callback._save_last_checkpoint(trainer, callback._monitor_candidates(trainer))

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if isinstance(exception, SystemExit):  # NeMo's, at SIGTERM, on all ranks
            finish_saving(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        finish_saving(trainer)  # NeMo's own callback does it before the last checkpoint


def finish_saving(trainer: Trainer) -> None:
    """Wait for the checkpoint that `async_save` writes in the background, and mark it finished."""
    io = trainer.strategy.checkpoint_io
    if isinstance(io, AsyncFinalizableCheckpointIO):
        io.maybe_finalize_save_checkpoint(blocking=True)


def note_steps(trainer: Trainer, pl_module: LightningModule) -> None:
    """Record the trained steps in the `.nemo` that NeMo's checkpoint callback writes next."""
    with open_dict(pl_module.cfg):
        pl_module.cfg[STEPS_KEY] = trainer.global_step


def is_planned(scheduler: Any) -> bool:
    """Whether the learning rate depends only on the step, as in NeMo's own schedules."""
    return type(scheduler).__module__ == lr_scheduler.__name__


def _count_last_batch(checkpoint: dict[str, Any]) -> None:
    """Count the batch of the last step as completed, so that validations keep their steps.

    A checkpoint that NeMo saves at SIGTERM is written before Lightning has counted it.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        counts["completed"] = counts["processed"]


def _validate_from_the_start(checkpoint: dict[str, Any]) -> None:
    """Forget the batches of the last validation: Lightning would validate on those after them."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    progress["current"] = dict.fromkeys(progress["current"], 0)


def _continue_epoch(checkpoint: dict[str, Any]) -> None:
    """Mark Lightning's epoch as unfinished: a run is one epoch, even if it has been extended."""
    loops = checkpoint["loops"]["fit_loop"]
    epochs = loops["epoch_progress"]["current"]
    if epochs["ready"] == 1:  # NeMo's own packed files may have had more
        loops["epoch_loop.batch_progress"]["is_last_batch"] = False
        epochs.update(processed=0, completed=0)
