"""Refuse to resume a checkpoint of transformers' `Trainer` with other stores or another loss.

`Trainer` restores the number of steps, not what was learned in them: that is kept in a file in each
of its checkpoints. It also restores the optimizer with its learning rate, whatever the arguments
say, and skips as many batches as were trained, whatever was in them: arguments that it would not
follow are kept and compared too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from nemo_kd.data.resumed import (
    FILE,
    FILE_IS_MISSING,
    differing,
    loss_settings,
    refuse_changed,
    steps_changed,
)
from nemo_kd.files import canonical_json, decode_json, publish, read_json, sha256_of_json
from nemo_kd.hf.collator import StoreCollator
from nemo_kd.hf.dataset import datasets_in
from nemo_kd.teacher.processes import say_once

OPTIMIZER = "Trainer would keep the checkpoint's"
JUMPS = "the learning rate would jump"
ROWS = "some rows would be trained on twice and others never"
ARGUMENTS = {
    **dict.fromkeys(("learning_rate", "weight_decay", "optim", "optim_args"), OPTIMIZER),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon"), OPTIMIZER),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler_kwargs"), JUMPS),
    **dict.fromkeys(("warmup_steps", "warmup_ratio"), JUMPS),
    "per_device_train_batch_size": OPTIMIZER,
    **dict.fromkeys(("samples_per_step", "dataloader_drop_last", "seed", "data_seed"), ROWS),
}
"""Arguments of `Trainer` that a resumed training cannot change → why."""


class SettingsKeeper(TrainerCallback):
    """Write the settings of a training into each checkpoint that `Trainer` saves.

    `resumed`: the checkpoint that it starts from, whose number of steps is compared.
    """

    def __init__(self, settings: dict[str, Any], resumed: Path | None = None) -> None:
        self.settings, self.resumed = settings, resumed

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say what another number of steps does; `Trainer` knows it from here on."""
        file = self.resumed and self.resumed / TRAINER_STATE_NAME
        then = read_json(file).get("max_steps") if file and file.is_file() else None
        if self.resumed and then not in (None, state.max_steps):
            kind = self.settings["lr_scheduler_type"]
            rate = [] if kind == "constant" else [f"the learning rate's schedule ({kind})"]
            line = steps_changed(self.resumed, then, state.max_steps, self.settings, rate)
            say_once([line])

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the file; `Trainer` calls it after the checkpoint is saved."""
        checkpoint = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if args.should_save and checkpoint.is_dir():  # elsewhere in a hyperparameter search
            publish(checkpoint / FILE, canonical_json(self.settings))


def settings_of(collator: StoreCollator, data: Any, args: Any) -> dict[str, Any]:
    """Return what a resumed training compares: loss, stores, samples' extent, `ARGUMENTS`."""
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
        **_arguments(args),
    }
    found: dict[str, Any] = decode_json(canonical_json(settings))
    return found


def _arguments(args: Any) -> dict[str, Any]:
    """Return the values of `ARGUMENTS`, the same ones for the same training."""
    given = {name: getattr(args, name, None) for name in ARGUMENTS}
    processes = 1 if args.accelerator_config.split_batches else args.world_size
    return {
        **{name: getattr(value, "value", value) for name, value in given.items()},  # of enums
        "warmup_ratio": None if args.warmup_steps else args.warmup_ratio,  # which steps replace
        "data_seed": None if args.data_seed == args.seed else args.data_seed,
        "samples_per_step": args.train_batch_size * args.gradient_accumulation_steps * processes,
    }


def check_resumed(checkpoint: Any, output_dir: str, settings: dict[str, Any]) -> Path | None:
    """Compare with the settings of a checkpoint, and return its path; None without one.

    Those without the file are resumed with a line, as are settings that an earlier version did not
    keep. `checkpoint`: as `Trainer.train` takes it, a path or True for the last in `output_dir`.

    Errors: NemoKDError, naming each difference.
    """
    path = get_last_checkpoint(output_dir) if checkpoint is True else checkpoint
    if not path:
        return None
    file = Path(path, FILE)
    if not file.is_file():
        missing = FILE_IS_MISSING.format(path, FILE)
        say_once([f"{missing}; Trainer keeps its learning rate, weight decay and batch size"])
        return Path(path)
    then = read_json(file)
    if absent := [name for name in ARGUMENTS if name not in then]:
        say_once([f"{file} has no {', '.join(absent)}, so they were not compared"])
    names = [name for name, value in settings.items() if then.get(name) != value]
    changed = differing([name for name in names if name not in absent], then, settings)
    remedy = f"train into another output_dir, or delete {file} to resume with the new ones"
    if reasons := dict.fromkeys(ARGUMENTS[name] for name in changed if name in ARGUMENTS):
        remedy = f"or train into another output_dir: {', and '.join(reasons)}"
    refuse_changed(Path(path), changed, then, settings, remedy)
    return Path(path)
