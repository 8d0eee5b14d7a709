"""Refuse to resume a checkpoint of transformers' `Trainer` with other stores or another loss.

`Trainer` restores the number of steps, not what was learned in them: that is kept in a file in each
of its checkpoints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from nemo_kd.data.resumed import FILE, FILE_IS_MISSING, loss_settings, refuse_changed
from nemo_kd.files import canonical_json, decode_json, publish, read_json, sha256_of_json
from nemo_kd.hf.collator import StoreCollator
from nemo_kd.hf.dataset import datasets_in
from nemo_kd.teacher.processes import say_once


class SettingsKeeper(TrainerCallback):
    """Write the settings of a training into each checkpoint that `Trainer` saves."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the file; `Trainer` calls it after the checkpoint is saved."""
        checkpoint = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if args.should_save and checkpoint.is_dir():  # elsewhere in a hyperparameter search
            publish(checkpoint / FILE, canonical_json(self.settings))


def settings_of(collator: StoreCollator, data: Any) -> dict[str, Any]:
    """Return what a resumed training compares: the loss, the stores and their samples' extent."""
    loss = loss_settings(collator.config)
    if (loss["sft_weight"], loss["kd_weight"]) == (None, None):
        loss["alpha"] = collator.config.weights[1]
    known, chosen = datasets_in(data), getattr(data, "indices", None)  # of torch's `Subset`
    stores = [store for one in known for store in one.stores] or collator.stores
    settings = {
        **loss,
        "stores": [store.fingerprint for store in stores],
        "samples": len(data) if hasattr(data, "__len__") else None,
        "longest_sample": max((one.longest for one in known), default=None),
        "subset": None if chosen is None else sha256_of_json([int(index) for index in chosen]),
    }
    found: dict[str, Any] = decode_json(canonical_json(settings))
    return found


def check_resumed(checkpoint: Any, output_dir: str, settings: dict[str, Any]) -> None:
    """Compare with the settings of a checkpoint; those without the file are resumed with a line.

    `checkpoint`: as `Trainer.train` takes it, a path or True for the last one in `output_dir`.

    Errors: NemoKDError, naming each difference.
    """
    path = get_last_checkpoint(output_dir) if checkpoint is True else checkpoint
    if not path:
        return
    file = Path(path, FILE)
    if not file.is_file():
        say_once([FILE_IS_MISSING.format(path, FILE)])
        return
    then = read_json(file)
    changed = [name for name, value in settings.items() if then.get(name) != value]
    remedy = f"train into another output_dir, or delete {file} to resume with the new ones"
    refuse_changed(Path(path), changed, then, settings, remedy)
