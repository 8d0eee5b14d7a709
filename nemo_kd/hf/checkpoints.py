"""Choose the checkpoint of `Trainer` to resume, and move those of later steps out of its way.

A kill may leave a checkpoint incomplete; `Trainer` takes the highest number, and fails.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from nemo_kd.errors import NemoKDError
from nemo_kd.files import read_json
from nemo_kd.teacher.processes import say_once

OPTIMIZERS = ("optimizer*", "rank*-optimizer.pt")
"""Optimizer's state in a checkpoint: files, or the directory of FSDP, of any kind of `Trainer`."""
SCHEDULER = "scheduler.pt"
DEEPSPEED = "global_step*"
"""DeepSpeed's directory, which has both."""


def chosen(checkpoint: Any, output_dir: str) -> Path | None:
    """Return the checkpoint that `Trainer.train` is asked to resume; None without one.

    `checkpoint`: a path, or True for the last in `output_dir`: the newest that is complete, with a
    line if that is not the newest.

    Errors: NemoKDError for a path to none or to an incomplete one, and for True if none of several
    is complete.
    """
    if checkpoint is True:
        return _newest_complete(Path(output_dir))
    if not checkpoint:
        return None
    path = Path(checkpoint)
    if not path.is_dir():
        raise NemoKDError(f"no checkpoint at {path}: give the path of a directory that has one")
    if not is_complete(path):
        raise NemoKDError(
            f"{path} was not saved completely ({TRAINER_STATE_NAME} is missing or incomplete): "
            f"choose another one in {path.parent}"
        )
    return path


def _newest_complete(output_dir: Path) -> Path | None:
    found = checkpoints_in(output_dir)
    complete = next((one for one in reversed(found) if is_complete(one)), None)
    if not found:
        return None
    if complete is None:
        raise NemoKDError(
            f"{output_dir} has no checkpoint that was saved completely, only {found[-1].name}: "
            "train into another output_dir, or delete it"
        )
    if complete != found[-1]:
        say_once([f"{found[-1]} was not saved completely, so {complete} is resumed"])
    return complete


def checkpoints_in(output_dir: Path) -> list[Path]:
    """Return the checkpoints in a directory, complete or not, in ascending order of steps."""
    found = [one for one in output_dir.glob("*") if _step_in_name(one) is not None and one.is_dir()]
    return sorted(found, key=lambda one: _step_in_name(one) or 0)


def _step_in_name(checkpoint: Path) -> int | None:
    found = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", checkpoint.name)
    return found and int(found[1])


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint has the file that `Trainer` writes last."""
    return step_of(checkpoint) is not None


def step_of(checkpoint: Path) -> int | None:
    """Return the number of steps of a checkpoint; None if it is incomplete."""
    file = checkpoint / TRAINER_STATE_NAME
    try:
        return int(read_json(file)["global_step"]) if file.is_file() else None
    except (NemoKDError, ValueError, KeyError, TypeError):
        return None


def refuse_without_optimizer(checkpoint: Path) -> None:
    """Raise NemoKDError for a checkpoint whose optimizer or schedule `Trainer` would begin anew.

    It begins both anew if one of them is missing.
    """
    if any(checkpoint.glob(DEEPSPEED)):
        return
    optimizer = any(any(checkpoint.glob(name)) for name in OPTIMIZERS)
    found = {"optimizer": optimizer, "schedule": (checkpoint / SCHEDULER).is_file()}
    missing = [f"no {name}" for name, is_there in found.items() if not is_there]
    if missing:
        why = " (save_only_model=True)" if len(missing) == 2 else ""
        raise NemoKDError(
            f"{checkpoint} has {' and '.join(missing)}{why}, so that optimizer and schedule would "
            "begin anew at its step: the learning rate would jump. Resume a checkpoint that has "
            "both, or train its weights as a new model into another output_dir"
        )


def move_later(checkpoint: Path, args: Any, wait_for_everyone: Callable[[], None]) -> None:
    """Move checkpoints of later steps in `args.output_dir` to `checkpoints-after-step-N` in it.

    `Trainer` would resume from them later, not from those that this training saves, and would
    delete the latter first (`save_total_limit`). Call on all processes, of which one moves.
    """
    step, folder = step_of(checkpoint), Path(args.output_dir)
    later = [one for one in checkpoints_in(folder) if (_step_in_name(one) or 0) > (step or 0)]
    later = [one for one in later if one.resolve() != checkpoint.resolve()]
    wait_for_everyone()  # until all have listed them
    if later and args.should_save:
        aside = folder / f"checkpoints-after-step-{step}"
        numbered = (aside.with_name(f"{aside.name}-{number}") for number in count(2))
        while aside.exists():
            aside = next(numbered)
        aside.mkdir()
        for one in later:
            one.rename(aside / one.name)
        say_once([f"moved {len(later)} checkpoints of steps after {step} to {aside}"])
    wait_for_everyone()
