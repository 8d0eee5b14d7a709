"""Print where a run's model is and the command that exports it, as the run's last line."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_kd.nemo.record import say
from nemo_kd.nemo.run_directory import RunDirectory

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def say_where(model: str | Path | None, directory: RunDirectory | None) -> None:
    """Print the path of the model and the command that exports it beside the run's checkpoints."""
    if model is None or directory is None:
        say("no model was written: exp_manager writes neither a .nemo nor checkpoints")
        return
    say(f"the model is {model}; for transformers: {export_command(model, directory.path / 'hf')}")


def export_command(model: str | Path, output: str | Path) -> str:
    """`nemo-kd export MODEL OUTPUT`, quoted for a shell."""
    return shlex.join(["nemo-kd", "export", str(model), str(output)])


def written(trainer: Trainer, directory: RunDirectory | None) -> Path | None:
    """Return the `.nemo` that a run has written, else its last or best checkpoint, if any."""
    if directory is not None and directory.has_student:
        return directory.student
    callback = trainer.checkpoint_callback
    paths = [getattr(callback, name, "") for name in ("last_model_path", "best_model_path")]
    # NeMo names a distributed checkpoint, which is a directory, like a file.
    found = [Path(path.removesuffix(ending)) for path in paths if path for ending in ("", ".ckpt")]
    return next((path for path in found if path.exists()), None)
