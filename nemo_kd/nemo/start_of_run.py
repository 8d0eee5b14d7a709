"""Decide and print whether a run starts, resumes or is complete, before writing anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf

from nemo_kd.checkpoints.source import CONFIG
from nemo_kd.checkpoints.tokenizer import read_member
from nemo_kd.errors import NemoKDError
from nemo_kd.nemo.length import validates
from nemo_kd.nemo.record import STEPS_KEY, Origin, Progress, Record, read
from nemo_kd.nemo.resumed_settings import (
    FIXED,
    NEW_RUN,
    Change,
    Settings,
    changes,
    check_allowed,
    matches,
    refuse,
)
from nemo_kd.nemo.run_directory import RunDirectory
from nemo_kd.nemo.splits import ResumeConfig, TrainSplit
from nemo_kd.settings.dataclass import settings_of
from nemo_kd.store.fingerprint import earlier_fingerprint, of_earlier_version
from nemo_kd.teacher.begin import locked
from nemo_kd.visible import say


def check_manager(manager: DictConfig | None) -> None:
    """Refuse settings of `exp_manager` under which a stopped run could not be resumed exactly.

    Errors: NemoKDError.
    """
    if manager is None:
        return
    if manager.get("disable_validation_on_resume") is False:
        raise NemoKDError(
            "exp_manager.disable_validation_on_resume=false is not supported: a validation that is "
            "run again would count twice for early stopping. Remove it: a validation that a stop "
            "has prevented is run in any case"
        )
    if manager.get("max_time_per_run") and manager.get("create_checkpoint_callback") is False:
        raise NemoKDError(
            f"exp_manager.max_time_per_run={manager.max_time_per_run} with "
            "create_checkpoint_callback=false would end the run without saving anything: remove "
            "one of the two"
        )


def dropout_notice(model_cfg: DictConfig) -> str:
    """Return a notice if dropout makes a resumed run differ from one without a stop; or ""."""
    adapters = [f"peft.{each}.adapter_dropout" for each in ("lora_tuning", "adapter_tuning")]
    keys = ["hidden_dropout", "attention_dropout", "ffn_dropout", *adapters]
    shares = {key: OmegaConf.select(model_cfg, key) for key in keys}
    on = [f"model.{key}={share}" for key, share in shares.items() if share]
    if not on:
        return ""
    return (
        f"{', '.join(on)}: the checkpoint has no state of random numbers, so dropout from here on "
        "is not that of a run without a stop"
    )


def what_is_done(directory: RunDirectory | None) -> tuple[Progress, Record | None]:
    """Read progress and record of the checkpoint to resume; (no progress, None) without one."""
    if directory is None or directory.checkpoint is None:
        return Progress(), None
    return read(directory.checkpoint)


@contextmanager
def alone_in(directory: RunDirectory | None) -> Iterator[None]:
    """Lock a run's directory against other trainings; prepare it to go back to a checkpoint.

    The lock is in the folder of the checkpoints: NeMo moves the files of the run's directory away.

    Collectives: broadcasts, a barrier.

    Errors: LockedError on every rank if another training holds the lock, NemoKDError if it has
    saved or removed checkpoints since the directory was read.
    """
    if directory is None:
        yield
        return
    from nemo_kd.mcore.layout import layout

    ranks = layout()
    with locked(str(directory.folder), ranks):
        if ranks.from_rank_0(ranks.rank == 0 and directory.has_changed()):
            raise NemoKDError(
                f"{directory.folder}: another training has written to it since this one was "
                f"started; run the same command again, or {NEW_RUN}"
            )
        if ranks.rank == 0 and directory.back is not None:
            directory.back.move()
        ranks.barrier()
        yield


def begin(directory: RunDirectory) -> None:
    """Refuse to start a run in a directory that contains the results of an earlier one.

    Errors: NemoKDError if there are checkpoints, or the `.nemo` that the run would write.
    """
    if directory.checkpoints:
        raise NemoKDError(
            f"{directory.checkpoints[-1]} exists, and exp_manager.resume_if_exists=false would "
            f"start another run in its directory: {NEW_RUN}, or remove it"
        )
    if directory.has_student:
        raise NemoKDError(
            f"{directory.student} exists already, without a checkpoint to resume from: "
            f"{NEW_RUN}, or remove it"
        )


def resume(
    cfg: DictConfig,
    directory: RunDirectory,
    done: Progress,
    then: Record,
    now: Record,
    raw: Settings,
) -> bool:
    """Compare a checkpoint's run with this one; False if it has ended and is saved.

    Errors: NemoKDError for changed settings and data that are not allowed (`refuse`), and for a run
    that would end before its checkpoint.
    """
    at, steps = directory.checkpoint, cfg.trainer.max_steps
    allow = list(settings_of(ResumeConfig, cfg.get("resume"), "resume").allow or ())
    changed = _compare(cfg, then, now, raw, allow, str(at))
    if then.settings is None:
        say(f"{at} has no record of its run's settings, so they were not compared")
    if done.step > steps:
        raise NemoKDError(
            f"{at} is at step {done.step}, after the end of a run of {steps} steps: raise "
            f"trainer.max_steps, or {NEW_RUN}"
        )
    validating = validates_first(cfg, done)
    if done.step == steps and not validating:
        if not _is_written(directory, steps):
            say(f"all {steps} steps are done: writing {directory.student} from {at}")
            return True
        student = f"the student is {directory.student}" if directory.student else f"in {at}"
        say(
            f"nothing to train: all {steps} steps are done, {student}. Raise trainer.max_steps to "
            f"train longer; {NEW_RUN}"
        )
        return False
    if done.stopped_early and _would_stop_early(cfg, changed):
        return _stopped_early(cfg, directory, done)
    with_what = ", with the validation of this step" if validating else ""
    say(f"resuming at step {done.step} of {steps} from {at}{with_what}")
    if changed:
        say("with new settings: " + "; ".join(map(str, changed)))
    if then.max_steps not in (None, steps):
        say(
            f"the run now has {steps} steps instead of {then.max_steps}: learning rate and "
            f"schedules are those of a run of {steps} steps"
        )
    return True


def validates_first(cfg: DictConfig, done: Progress) -> bool:
    """Whether a validation is due at the checkpoint's step that was not run before it was saved."""
    due = done.step > 0 and validates(cfg) and done.step % cfg.trainer.val_check_interval == 0
    return due and not done.validated


EARLY_STOPPING = (
    "exp_manager.create_early_stopping_callback",
    "exp_manager.early_stopping_callback_params",
)


def _would_stop_early(cfg: DictConfig, changed: list[Change]) -> bool:
    """Whether early stopping is on, with the settings with which it ended the run."""
    on = cfg.exp_manager.get("create_early_stopping_callback")
    return bool(on) and not any(matches(change.key, EARLY_STOPPING) for change in changed)


def _stopped_early(cfg: DictConfig, directory: RunDirectory, done: Progress) -> bool:
    """As `resume`, for a run that early stopping has ended."""
    at, steps = directory.checkpoint, cfg.trainer.max_steps
    ended = f"early stopping ended the run at step {done.step} of {steps} ({done.stopped_early})"
    if not _is_written(directory, done.step):
        say(f"{ended}: writing {directory.student} from {at}")
        cfg.trainer.max_steps = done.step
        return True
    student = f"the student is {directory.student}" if directory.student else f"in {at}"
    say(
        f"nothing to train: {ended}, {student}. To train on, set "
        f"exp_manager.create_early_stopping_callback=false or a larger "
        f"exp_manager.early_stopping_callback_params.patience, with resume.allow=[exp_manager]; "
        f"{NEW_RUN}"
    )
    return False


def _compare(
    cfg: DictConfig, then: Record, now: Record, raw: Settings, allow: list[str], at: str
) -> list[Change]:
    """Return the changed settings; refuse changes that are not allowed."""
    settings = [configuration for configuration in (then.settings, now.settings) if configuration]
    check_allowed(allow, *settings)
    found = [] if then.settings is None else changes(then.settings, now.settings or {}, raw)
    found += _other_files(cfg, then, now)
    fixed = _fixed(cfg)
    longer = then.max_steps not in (None, now.max_steps)
    has_store = bool(TrainSplit.of(cfg.model.data.train_ds).store)
    if longer and ("trainer.max_steps" in fixed or not has_store):
        found.append(Change("trainer.max_steps", then.max_steps, now.max_steps))
    refuse(found, allow, fixed, at)
    return found


def _other_files(cfg: DictConfig, then: Record, now: Record) -> list[Change]:
    """Return changes of the student and the data: other contents, not merely another path."""
    kind = "store" if TrainSplit.of(cfg.model.data.train_ds).store else "file_names"
    pairs: list[tuple[str, list[Origin] | None, list[Origin] | None]] = [
        (f"model.data.train_ds.{kind}", then.train_stores, now.train_stores),
        ("model.restore_from_path", *_checkpoints(then.student, now.student)),
        ("model.peft.restore_from_path", *_checkpoints(then.adapters, now.adapters)),
    ]
    if then.chat_template and now.chat_template:  # an older checkpoint does not record it
        template = ("model.data.train_ds.chat_template", [then.chat_template], [now.chat_template])
        pairs.append(template)
    if then.settings is None:  # an older checkpoint, which records at most its data
        pairs = [pair for pair in pairs if pair[1]]
    return [
        Change(key, _named(old), _named(new))
        for key, old, new in pairs
        if [one["fingerprint"] for one in old or []] != [one["fingerprint"] for one in new or []]
    ]


def _checkpoints(then: Origin | None, now: Origin | None) -> tuple[list[Origin], list[Origin]]:
    """Return both as lists, the present one with a fingerprint of the recorded one's version."""
    if then and now and of_earlier_version(then["fingerprint"]):
        now = {**now, "fingerprint": earlier_fingerprint(Path(now["path"]))}
    return [then] if then else [], [now] if now else []


def _named(origins: list[Origin] | None) -> str:
    named = [f"{one['path']} ({one['fingerprint'][:12]})" for one in origins or []]
    return ", ".join(named) or "none"


def _fixed(cfg: DictConfig) -> dict[str, str]:
    """Map the keys that this run cannot change when it resumes to the reasons."""
    fixed = dict(FIXED)
    if not TrainSplit.of(cfg.model.data.train_ds).store:
        why = "NeMo's order of SFT files without a store depends on it"
        fixed |= {"model.global_batch_size": why, "model.data.train_ds.global_batch_size": why}
    if not _is_planned(cfg):
        why = f"model.optim.sched.name={cfg.model.optim.sched.name} has its state in the checkpoint"
        fixed |= {"model.optim.*": why, "trainer.max_steps": why}
    return fixed


def _is_planned(cfg: DictConfig) -> bool:
    from nemo.core.optim import lr_scheduler

    schedule = cfg.model.optim.get("sched")
    if not schedule or not schedule.get("name"):
        return True
    known = lr_scheduler.AVAILABLE_SCHEDULERS.get(schedule.name)
    return known is None or known.__module__ == lr_scheduler.__name__


def _is_written(directory: RunDirectory, steps: int) -> bool:
    """Whether the `.nemo` of the last step exists: a run may be killed before writing it."""
    return directory.student is None or (
        directory.has_student and trained_steps(directory.student) in (None, steps)
    )


def trained_steps(nemo_file: Path) -> int | None:
    """Return the steps of the run that wrote a `.nemo` (file or directory); None if unknown."""
    steps = yaml.safe_load(read_member(nemo_file, CONFIG)).get(STEPS_KEY)
    return None if steps is None else int(steps)
