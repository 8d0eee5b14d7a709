"""Find a run's directory as NeMo's `exp_manager` chooses it: checkpoints, student, metrics."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_kd.errors import NemoKDError
from nemo_kd.files import published
from nemo_kd.nemo.record import read
from nemo_kd.visible import say

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class RunDirectory:
    """The contents of a run's directory before `exp_manager` changes it."""

    path: Path
    checkpoint: str | None
    """The checkpoint to resume from; None: the run starts from the beginning."""
    student: Path | None
    """The `.nemo` that the run writes at its end; None: it writes none."""
    checkpoints: tuple[Path, ...] = ()
    """The finished checkpoints of earlier starts, of which the newest is resumed from."""
    folder: Path = Path("checkpoints")
    """The directory of the checkpoints."""
    back: Back | None = None
    """If this start resumes from a checkpoint that the user has chosen."""

    @property
    def has_student(self) -> bool:
        return self.student is not None and self.student.exists()

    def has_changed(self) -> bool:
        """Whether another training has saved or removed checkpoints since this was found."""
        return tuple(_finished_checkpoints(self.folder)) != self.checkpoints


@dataclass(frozen=True)
class Back:
    """A start from `exp_manager.resume_from_checkpoint`.

    Checkpoints of later steps are moved away. Otherwise the next start would resume from them, not
    from those that this one saves, and NeMo would rank them among these.
    """

    step: int
    newer: tuple[Path, ...]
    """The checkpoints of later steps."""
    aside: Path
    """The directory to which they are moved. It is created even if there are none: if it exists,
    the same command (of a requeued job) has gone back already, and resumes from the newest."""

    def move(self) -> None:
        """Move the checkpoints; call on one rank. A kill in between leaves `aside` missing."""
        unfinished = self.aside.with_name(f".{self.aside.name}")
        unfinished.mkdir(parents=True, exist_ok=True)
        for checkpoint in self.newer:
            for path in paths_of(checkpoint):
                target = unfinished / path.relative_to(checkpoint.parent)
                target.parent.mkdir(exist_ok=True)
                path.rename(target)
        unfinished.rename(self.aside)
        if self.newer:
            say(f"moved {len(self.newer)} checkpoints of steps after {self.step} to {self.aside}")


def paths_of(checkpoint: Path) -> list[Path]:
    """Return the file or directory of a checkpoint, or the files of its ranks, as NeMo names them.

    Those of adapters lie in `mp_rank_00` and so on.
    """
    if checkpoint.exists():
        return [checkpoint]
    return sorted(checkpoint.parent.glob(f"*_rank_*/{checkpoint.name}"))


def find(cfg: DictConfig) -> RunDirectory | None:
    """Find the directory that `exp_manager` will choose; None without an `exp_manager`.

    Errors: NemoKDError for a `dirpath` that is a URL, and for a `resume_from_checkpoint` that was
    not saved completely; NeMo's own, if it finds no checkpoint or only unfinished ones.
    """
    from nemo.utils import exp_manager as nemo

    if cfg.get("exp_manager") is None:
        return None
    settings = _settings(cfg)
    path, name = _named(settings)
    parameters = settings.checkpoint_callback_params
    if "://" in (parameters.dirpath or ""):
        raise NemoKDError(
            f"exp_manager.checkpoint_callback_params.dirpath={parameters.dirpath}: the run's "
            "checkpoints must be in a mounted file system; set a path instead of a URL"
        )
    checkpoints = Path(parameters.dirpath or path / "checkpoints")
    finished = _finished_checkpoints(checkpoints)
    back = None
    if settings.resume_from_checkpoint:
        given = Path(settings.resume_from_checkpoint)
        back = _back(given, checkpoints, finished)
        _pin(cfg, path, given if back else newest(finished))
    elif finished and settings.resume_if_exists:
        latest = newest(finished)
        if [latest] != [one for one in finished if _is_last(one)]:
            _pin(cfg, path, latest)
    settings = _settings(cfg)
    stand_in = SimpleNamespace(ckpt_path=None)  # for the trainer, which is built later
    nemo.check_resume(
        stand_in,
        str(path / "nothing-to-move"),  # check_resume moves the files in this directory
        settings.resume_if_exists,
        settings.resume_past_end,
        settings.resume_ignore_no_checkpoint,
        str(checkpoints),
        settings.resume_from_checkpoint,
    )
    writes = settings.create_checkpoint_callback and parameters.save_nemo_on_train_end
    prefix = parameters.prefix or name or settings.name or "default"
    student = checkpoints / f"{prefix}{parameters.postfix}"
    return RunDirectory(
        path=path,
        checkpoint=stand_in.ckpt_path,
        student=student if writes else None,
        checkpoints=tuple(finished),
        folder=checkpoints,
        back=back,
    )


def _back(given: Path, folder: Path, finished: Collection[Path]) -> Back | None:
    """Return how to go back to `given`; None if an earlier start of the command has done so.

    Errors: NemoKDError if it was not saved completely.
    """
    from nemo.utils.callbacks.nemo_model_checkpoint import NeMoModelCheckpoint

    if NeMoModelCheckpoint.is_checkpoint_unfinished(given):
        raise NemoKDError(
            f"exp_manager.resume_from_checkpoint={given} was not saved completely: choose another "
            f"one in {given.parent}"
        )
    step = read(str(given))[0].step
    newer = tuple(one for one in finished if read(str(one))[0].step > step)
    back = Back(step, newer, folder.with_name(f"{folder.name}-after-step-{step}"))
    if not (newer and back.aside.exists()):
        return back
    say(
        f"an earlier start has resumed from exp_manager.resume_from_checkpoint={given}, so this "
        f"one resumes from the newest checkpoint; to go back again, rename {back.aside}"
    )
    return None


def _settings(cfg: DictConfig) -> Any:
    from nemo.utils.exp_manager import ExpManagerConfig

    given = OmegaConf.create(OmegaConf.to_container(cfg.exp_manager, resolve=True))
    return OmegaConf.merge(OmegaConf.structured(ExpManagerConfig), given)


def _named(settings: Any) -> tuple[Path, str]:
    """Return the run's directory and the name of its files."""
    from nemo.utils.exp_manager import get_log_dir

    path, _, name, _ = get_log_dir(
        trainer=SimpleNamespace(logger=None),
        exp_dir=settings.exp_dir,
        name=settings.name,
        version=settings.version,
        explicit_log_dir=settings.explicit_log_dir,
        use_datetime_version=settings.use_datetime_version,
        resume_if_exists=settings.resume_if_exists,
    )
    return path, name


def _finished_checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoints that were saved completely, the ones named `last` and the others.

    NeMo resumes from one named `last` only: there is none with `save_last=false`, and two, or one
    that is not the newest, if a run was killed between the saves of a validation.
    """
    from nemo.utils.callbacks.nemo_model_checkpoint import NeMoModelCheckpoint
    from nemo.utils.model_utils import uninject_model_parallel_rank

    found = [path.parent for path in directory.glob("*/common.pt")]
    files = directory.rglob("*.ckpt")
    found = sorted(found or {Path(uninject_model_parallel_rank(str(file))) for file in files})
    return [path for path in found if not NeMoModelCheckpoint.is_checkpoint_unfinished(path)]


def _is_last(checkpoint: Path) -> bool:
    return checkpoint.name.endswith(("-last", "-last.ckpt"))


def newest(checkpoints: Collection[Path]) -> Path:
    """Return the checkpoint with the most steps; of equal steps one named `last`."""
    return max(checkpoints, key=lambda one: (read(str(one))[0].step, _is_last(one)))


def _pin(cfg: DictConfig, path: Path, checkpoint: Path) -> None:
    """Make `exp_manager` resume from this checkpoint, which it would not find by itself."""
    with open_dict(cfg):
        cfg.exp_manager.explicit_log_dir = str(path)
        cfg.exp_manager.resume_if_exists = False
        cfg.exp_manager.resume_from_checkpoint = str(checkpoint)


def keep_metrics(directory: Path, step: int, *, validated: bool) -> None:
    """Restore `metrics.jsonl`, which `exp_manager` has moved to `run_N`, up to the checkpoint.

    Lines of later steps are left out, since those steps are trained again, and the validation after
    `step`, the checkpoint's, unless it was `validated` before it was saved. Call on one rank.
    """
    found = directory.glob(f"run_*/{METRICS}")
    moved = max(found, key=lambda file: int(file.parent.name.removeprefix("run_")), default=None)
    if moved is None or (directory / METRICS).exists():
        return
    with (
        published(directory / METRICS) as temporary,
        moved.open(encoding="utf-8") as old,
        temporary.open("w", encoding="utf-8") as new,
    ):
        new.writelines(line for line in old if _position(line) <= (step, validated))
    moved.unlink()


def _position(line: str) -> tuple[float, bool]:
    """Return the step of a line, and whether it is of a validation; sorts as they were written.

    The step is infinity for an incomplete line of a killed run.
    """
    try:
        values = json.loads(line)
        return float(values["step"]), any(name.startswith("val") for name in values)
    except ValueError:
        return float("inf"), False
