"""Resuming a run exactly where its checkpoint was, under the settings that it is given now."""

from __future__ import annotations

import dataclasses
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from nemo.collections.nlp.data.language_modeling.megatron.megatron_batch_samplers import (
    MegatronPretrainingBatchSampler,
)
from nemo.core.optim import lr_scheduler
from omegaconf import open_dict

from nemo_kd.nemo.record import CHECKPOINT_KEY, STEPS_KEY, Record

SCHEDULE_PROGRESS = ("last_epoch", "_step_count")
GROUP_STATE = ("params", "step")
"""Of an optimizer's parameter group: what is not a setting."""


class WholeRunBatchSampler(MegatronPretrainingBatchSampler):
    """NeMo's sampler with the batches of the whole run for its length.

    NeMo's is what remains to be consumed, and Lightning, which remembers how many batches it has
    had, would end the epoch early and begin again with the first samples. `batches_done`: those of
    earlier starts, which may have been of another size.
    """

    def __init__(self, *arguments: Any, batches_done: int = 0, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.batches_done = batches_done

    def __len__(self) -> int:
        whole, rest = divmod(self.total_samples - self.consumed_samples, self.global_batch_size)
        return self.batches_done + whole + bool(rest and not self.drop_last)


class RunKeeper(Callback):
    """Keeps a run's record in its checkpoints; lets the run's settings win over a checkpoint's.

    Lightning restores learning-rate schedules and the optimizer's settings from a checkpoint: a
    longer run, or another learning rate, would go unnoticed.
    """

    def __init__(self, record: Record) -> None:
        self.record = record
        self._groups: list[dict[str, Any]] = []  # as the configuration sets them

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        note_steps(trainer, pl_module)
        done = trainer.global_step - pl_module.init_global_step
        checkpoint[CHECKPOINT_KEY] = {
            **dataclasses.asdict(self.record),
            "consumed_samples": pl_module.compute_consumed_samples(done),
        }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        _go_on_within_the_epoch(checkpoint)
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
        # Lightning keeps the checkpoint that it resumed from, beside the next "last" one; NeMo
        # then refuses to choose between them at the third start.
        if str(trainer.ckpt_path).endswith(("-last", "-last.ckpt")):
            trainer.ckpt_path = None
        if not self._groups:
            return
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        for group, settings in zip(groups, self._groups, strict=True):
            group.update(settings)
        for config in trainer.lr_scheduler_configs:
            config.scheduler.last_epoch -= 1
            config.scheduler.step()  # sets the learning rate of the step that comes next

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        note_steps(trainer, pl_module)


def note_steps(trainer: Trainer, pl_module: LightningModule) -> None:
    """Into the configuration of the `.nemo` that NeMo's checkpoint callback writes next."""
    with open_dict(pl_module.cfg):
        pl_module.cfg[STEPS_KEY] = trainer.global_step


def is_planned(scheduler: Any) -> bool:
    """Whether the learning rate of a step is a formula of its number, as with NeMo's own."""
    return type(scheduler).__module__ == lr_scheduler.__name__


def _go_on_within_the_epoch(checkpoint: dict[str, Any]) -> None:
    """A run is one epoch of Lightning's, also one that is longer now than when it was saved."""
    loops = checkpoint["loops"]["fit_loop"]
    epochs = loops["epoch_progress"]["current"]
    if epochs["ready"] == 1:  # NeMo's own packed files may have had more
        loops["epoch_loop.batch_progress"]["is_last_batch"] = False
        epochs.update(processed=0, completed=0)
