"""Compute a run's length in steps, and the steps between validations and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from nemo_kd.checkpoints.model import CheckpointError
from nemo_kd.checkpoints.source import CONFIG
from nemo_kd.checkpoints.tokenizer import read_member
from nemo_kd.data import LengthLimit, fit_lengths, pack_samples
from nemo_kd.errors import NemoKDError
from nemo_kd.nemo.config import kd_training_config
from nemo_kd.nemo.positions import max_positions
from nemo_kd.nemo.record import Progress
from nemo_kd.nemo.splits import Split, splits_of
from nemo_kd.sft import open_files
from nemo_kd.store import Store
from nemo_kd.visible import say

NO_EPOCH_LIMIT = 9999
"""Value of `max_epochs` in NeMo's configurations that means no limit on epochs."""


class Epoch(NamedTuple):
    """The size of an epoch; to count its samples reads the index of every store."""

    samples: int
    steps: int


def fit_length(cfg: DictConfig, done: Progress) -> None:
    """Convert `trainer.max_epochs` and `val_check_interval` to steps; set checkpoint intervals.

    `done`: the progress of the checkpoint that the run resumes from.

    Errors: NemoKDError for a run without an end or without any step, and for settings that allow no
    validation.
    """
    trainer = cfg.trainer
    refuse_part_epochs(trainer)
    epoch = _epoch(cfg) if _limits(trainer.get("max_epochs")) else None
    steps, of_epoch = _steps(cfg, epoch, done), epoch.steps if epoch else None
    with open_dict(trainer):
        trainer.max_steps, trainer.max_epochs = steps, -1
        trainer.val_check_interval = _interval(trainer.get("val_check_interval"), steps, of_epoch)
    _check_warmup(cfg, steps)
    _check_schedule(cfg, steps)
    if validates(cfg):
        _check_validation(cfg)
    else:
        trainer.limit_val_batches = 0
    if cfg.get("exp_manager") is not None:
        _fit_checkpoints(cfg)
        _fit_early_stopping(cfg)


def check_split_lengths(cfg: DictConfig) -> None:
    """Check that the longest sequence can be split as the layout splits sequences.

    Sequence parallelism splits it over the tensor-parallel ranks, context parallelism into two
    chunks for each context-parallel rank. Shorter ones are padded to a length that can be split.

    Errors: NemoKDError for a `max_seq_length` that cannot.
    """
    model = cfg.model
    context = model.get("context_parallel_size") or 1
    parts = 2 * context if context > 1 else 1
    parts *= model.tensor_model_parallel_size if model.get("sequence_parallel") else 1
    for name, split in splits_of(model.data).items():
        length = model.data[name].max_seq_length
        if split.sources and length % parts:
            lower = length - length % parts
            raise NemoKDError(
                f"model.data.{name}.max_seq_length={length} cannot be split into {parts} equal "
                "parts, as model.sequence_parallel and model.context_parallel_size do: set "
                + (f"{lower} or " if lower else "")
                + f"{lower + parts}"
            )


def check_evaluation(cfg: DictConfig) -> None:
    """Check that an evaluation measures at least a batch of every set.

    Errors: NemoKDError if it does not.
    """
    refuse_part_epochs(cfg.trainer)
    if not validates(cfg):
        raise NemoKDError(
            f"trainer.limit_val_batches={cfg.trainer.limit_val_batches} would measure nothing: set "
            "a number of batches, or 1.0 for all of model.data.validation_ds"
        )
    _check_validation(cfg)


def validates(cfg: DictConfig) -> bool:
    """Whether there is validation data, and validation is not turned off."""
    limit = cfg.trainer.get("limit_val_batches")
    sources = Split.of(cfg.model.data.validation_ds).sources
    return bool(sources) and (limit is None or limit > 0)


def samples_of(cfg: DictConfig, block: str) -> list[int]:
    """Return the number of samples (or packs) of each store and file of `model.data.<block>`."""
    data, positions = cfg.model.data[block], _learned_positions(cfg.model)
    split = Split.of(data)
    return [
        *(_used(Store(path), split, data.max_seq_length, positions) for path in split.store),
        *(rows_of(file) for file in split.file_names),
    ]


def rows_of(file: str) -> int:
    """Count the rows of an SFT file or of the files of a glob."""
    return len(open_files(file))


def _used(store: Store, split: Split, length: int, positions: int | None) -> int:
    limit = LengthLimit.of_positions(length, positions)
    fitting = fit_lengths(store, limit, split.over_long)
    if not split.packed_sequence:
        return len(fitting)
    # The number of packs does not depend on the seed.
    return len(
        pack_samples(store, fitting, length, 0 if split.shuffle else None, longest=limit.tokens)
    )


def _learned_positions(model: DictConfig) -> int | None:
    """Return the number of learned positions of the student, by its `.nemo`; None if it has none.

    None also for what cannot be opened: restoring it then says why.
    """
    path = None if OmegaConf.is_missing(model, "restore_from_path") else model.restore_from_path
    if path is None:
        return None
    try:
        config = yaml.safe_load(read_member(Path(path), CONFIG))
        return max_positions(OmegaConf.create(config)) if isinstance(config, dict) else None
    except (CheckpointError, OSError, yaml.YAMLError, OmegaConfBaseException):
        return None


def _limits(max_epochs: int | None) -> bool:
    return max_epochs is not None and 0 <= max_epochs < NO_EPOCH_LIMIT


def _steps(cfg: DictConfig, epoch: Epoch | None, done: Progress) -> int:
    """Return the steps of the run up to its first limit, those already `done` included."""
    max_steps, max_epochs = cfg.trainer.get("max_steps"), cfg.trainer.get("max_epochs")
    if max_steps is None or max_steps == -1:
        max_steps = None
    elif max_steps < 1:
        raise NemoKDError(f"trainer.max_steps={max_steps}: expected at least 1, or -1 for no limit")
    if epoch is None:
        if max_steps is None:
            raise NemoKDError(
                f"the run has no end: trainer.max_steps=-1 and trainer.max_epochs={max_epochs} set "
                "no limit; set one of them"
            )
        return int(max_steps)
    batch = cfg.model.data.train_ds.global_batch_size
    steps = int(epoch.steps * max_epochs)
    if done.consumed_samples != done.step * batch:  # resumed with another batch size
        steps = done.step + max(max_epochs * epoch.samples - done.consumed_samples, 0) // batch
    end = steps if max_steps is None else min(max_steps, steps)
    say(
        f"trainer.max_epochs={max_epochs}: {steps} steps ({epoch.steps} steps per epoch of "
        f"{epoch.samples} samples, {batch} per step)"
        + (f"; trainer.max_steps={max_steps} ends first" if end < steps else "")
    )
    return int(end)


def _epoch(cfg: DictConfig) -> Epoch:
    """Return the size of an epoch, which has as many draws as the blend has samples."""
    data = cfg.model.data.train_ds
    split = Split.of(data)
    if not split.store and split.packed_sequence:
        raise NemoKDError(
            f"trainer.max_epochs={cfg.trainer.max_epochs} with NeMo's packed files is not "
            "supported: set trainer.max_steps"
        )
    if cfg.trainer.max_epochs == 0:
        raise NemoKDError("trainer.max_epochs=0 trains nothing; set -1 for no limit")
    samples, batch = sum(samples_of(cfg, "train_ds")), data.global_batch_size
    steps = samples // batch if data.get("drop_last", True) else -(-samples // batch)
    if not steps:
        raise NemoKDError(
            f"model.global_batch_size={batch} is more than the {samples} samples of an epoch, "
            f"which trainer.max_epochs={cfg.trainer.max_epochs} counts: lower it, set "
            "model.data.train_ds.drop_last=false, or set trainer.max_steps instead"
        )
    return Epoch(samples, int(steps))


def refuse_part_epochs(trainer: DictConfig) -> None:
    """Refuse settings of Lightning that would end a run early or change its validations.

    Errors: NemoKDError that names the setting to use instead.
    """
    if trainer.get("fast_dev_run"):
        raise NemoKDError(
            "trainer.fast_dev_run would train about one batch and save nothing: set "
            "trainer.max_steps to a small number of steps instead"
        )
    if trainer.get("limit_train_batches") not in (None, 1.0) or trainer.get("overfit_batches"):
        raise NemoKDError(
            "trainer.limit_train_batches and trainer.overfit_batches are not supported: set "
            "trainer.max_steps to the number of steps"
        )
    if trainer.get("max_time"):
        raise NemoKDError(
            f"trainer.max_time={trainer.max_time} counts the time of all starts, so that a run it "
            "has ended cannot be resumed: set exp_manager.max_time_per_run, after which the same "
            "command resumes"
        )
    if trainer.get("accumulate_grad_batches") not in (None, 1):
        raise NemoKDError(
            f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches} is not supported: "
            "Megatron accumulates the gradients of model.global_batch_size / "
            "(model.micro_batch_size * data-parallel ranks) micro-batches; set these two"
        )
    if trainer.get("check_val_every_n_epoch") not in (None, 1):
        raise NemoKDError(
            f"trainer.check_val_every_n_epoch={trainer.check_val_every_n_epoch} is not supported: "
            "set trainer.val_check_interval to a number of steps"
        )


def _interval(given: Any, steps: int, epoch: int | None) -> int:
    """Return the steps between validations.

    A float is a fraction of an epoch or, for a run without epochs, of the run.
    """
    given = 1.0 if given is None else given
    if isinstance(given, int) and given >= 1:
        return min(given, steps)
    if isinstance(given, float) and 0 < given <= 1:
        return min(max(int((epoch or steps) * given), 1), steps)
    raise NemoKDError(
        f"trainer.val_check_interval={given}: expected a number of steps (at least 1), or a "
        "fraction in (0, 1] of an epoch; trainer.limit_val_batches=0 turns validation off"
    )


def _check_warmup(cfg: DictConfig, steps: int) -> None:
    """Print a warning if the run ends before its learning rate is reached."""
    optim = cfg.model.get("optim")
    schedule = optim.get("sched") if optim else None
    warmup = schedule.get("warmup_steps") if schedule and schedule.get("name") else None
    if warmup and warmup >= steps:
        say(
            f"WARNING: model.optim.sched.warmup_steps={warmup} of a run of {steps} steps: the "
            f"learning rate reaches at most {optim.lr * steps / (warmup + 1):.2g} of "
            f"model.optim.lr={optim.lr:g}; lower warmup_steps, or set null and warmup_ratio"
        )


def _check_schedule(cfg: DictConfig, steps: int) -> None:
    """Print a warning if the run ends before its schedule of alpha and temperature."""
    kd = kd_training_config(cfg.model.kd)
    if kd.scheduled and kd.schedule_steps is not None and kd.schedule_steps > steps:
        last = kd.at(steps - 1, steps)
        say(
            f"WARNING: model.kd.schedule_steps={kd.schedule_steps} of a run of {steps} steps: "
            f"its last step has alpha={last.weights[1]:.4g}, temperature={last.temperature:.4g}, "
            "not the schedule's end, with which it is validated; set null for the run's length"
        )


def _check_validation(cfg: DictConfig) -> None:
    """Require a batch from every set: without one, no checkpoint or result would be saved."""
    data, limit = cfg.model.data.validation_ds, cfg.trainer.get("limit_val_batches")
    split = Split.of(data)
    if split.packed_sequence:  # NeMo's own packed files
        return
    batch = data.global_batch_size
    for source, samples in zip(split.sources, samples_of(cfg, "validation_ds"), strict=True):
        batches = samples // batch if data.get("drop_last", False) else -(-samples // batch)
        if not batches:
            raise NemoKDError(
                f"{source} gives no validation batch: {samples} samples, "
                f"model.data.validation_ds.global_batch_size={batch}; lower it, or set "
                "model.data.validation_ds.drop_last=false"
            )
        if isinstance(limit, float) and limit * batches < 1:
            raise NemoKDError(
                f"trainer.limit_val_batches={limit} of {batches} batches of {source} is less than "
                "one: set a number of batches, or 0 for no validation"
            )


def _fit_checkpoints(cfg: DictConfig) -> None:
    """Without a validation, rank checkpoints by the training loss, at the same intervals."""
    with open_dict(cfg):
        checkpoints = cfg.exp_manager.setdefault("checkpoint_callback_params", {})
        triggers = ("every_n_train_steps", "train_time_interval")
        own = any(checkpoints.get(trigger) for trigger in triggers)
        if own and not checkpoints.get("every_n_epochs"):
            checkpoints.every_n_epochs = 0  # Lightning allows one of the three
        if validates(cfg):
            return
        if str(checkpoints.get("monitor") or "val").startswith("val"):
            checkpoints.monitor = "reduced_train_loss"
            checkpoints.filename = (
                f"{cfg.name}--{{reduced_train_loss:.3f}}-{{step}}-{{consumed_samples}}"
            )
        if not own:
            checkpoints.every_n_epochs = 0
            checkpoints.every_n_train_steps = cfg.trainer.val_check_interval


def _fit_early_stopping(cfg: DictConfig) -> None:
    """Check after each validation; at `val_check_interval=1` Lightning would at an epoch's end."""
    if not cfg.exp_manager.get("create_early_stopping_callback"):
        return
    if not validates(cfg):
        say(
            "exp_manager.create_early_stopping_callback=true has no effect: the run has no "
            "validation; set model.data.validation_ds.store, and trainer.limit_val_batches above 0"
        )
    key = "exp_manager.early_stopping_callback_params.check_on_train_epoch_end"
    OmegaConf.update(cfg, key, False, force_add=True)
