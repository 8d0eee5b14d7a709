"""Print where a run's model is and the command that exports it, as the run's last line."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from nemo_kd.nemo.restored_adapters import PATH
from nemo_kd.nemo.run_directory import RunDirectory, paths_of
from nemo_kd.visible import say

SAVE = "exp_manager.checkpoint_callback_params.save_nemo_on_train_end"
EXPORTED = ("none", "lora")
"""Values of `model.peft.peft_scheme` whose result `nemo-kd export` writes."""

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def say_where(cfg: DictConfig, model: str | Path | None, directory: RunDirectory | None) -> None:
    """Print the path of the model and the command that exports it to the run's directory."""
    if model is None or directory is None:
        say("no model was written: exp_manager writes neither a .nemo nor checkpoints")
        return
    scheme = cfg.model.peft.peft_scheme or "none"
    what = "model is" if scheme == "none" else f"adapters ({scheme}) are"
    command = ""
    if scheme != "none" and str(model).endswith(".ckpt"):
        # No export reads it, and NeMo loads that of one rank only.
        use = "an evaluation or a merge" if scheme == "lora" else "an evaluation"
        loads = f"; {PATH} takes them for {use}" if Path(model).exists() else ""
        command = f"{loads}. For a .nemo, run the same command with {SAVE}=true"
    elif scheme in EXPORTED:
        options = [] if scheme == "none" else ["--base-model", str(cfg.model.restore_from_path)]
        command = f"; for transformers: {export_command(model, directory.path / 'hf', *options)}"
    say(f"the {what} {model}{command}")


def export_command(model: str | Path, output: str | Path, *options: str) -> str:
    """`nemo-kd export MODEL OUTPUT`, quoted for a shell."""
    return shlex.join(["nemo-kd", "export", str(model), str(output), *options])


def written(trainer: Trainer, directory: RunDirectory | None) -> Path | None:
    """Return the `.nemo` that a run has written, else its last or best checkpoint, if any."""
    if directory is not None and directory.has_student:
        return directory.student
    callback = trainer.checkpoint_callback
    paths = [getattr(callback, name, "") for name in ("last_model_path", "best_model_path")]
    # NeMo names a distributed checkpoint, which is a directory, like a file.
    found = [Path(path.removesuffix(ending)) for path in paths if path for ending in ("", ".ckpt")]
    return next((path for path in found if paths_of(path)), None)
