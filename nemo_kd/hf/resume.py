"""Refuse to resume a checkpoint of transformers' `Trainer` as another training, or to mix two.

`Trainer` restores the number of steps, not what was learned in them: that is kept in a file in each
of its checkpoints. It also restores the optimizer with its learning rate, whatever the arguments
say, and skips as many batches as were trained, whatever was in them: arguments that it would not
follow are kept and compared too. Of adapters, it restores neither their settings nor their base.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from nemo_kd.data.resumed import (
    FILE,
    FILE_IS_MISSING,
    differing,
    loss_settings,
    refuse_changed,
    steps_changed,
)
from nemo_kd.errors import NemoKDError
from nemo_kd.files import canonical_json, decode_json, publish, read_json, sha256_of_json
from nemo_kd.hf.checkpoints import checkpoints_in, refuse_without_optimizer
from nemo_kd.hf.collator import StoreCollator
from nemo_kd.hf.dataset import datasets_in, wrapped_in
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
OF_THE_FILE = (
    *("base_model_name_or_path", "inference_mode", "revision", "auto_mapping", "peft_version"),
    *("runtime_config", "peft_type"),
)
"""Settings of adapters that do not change what they compute."""
ADAPTERS = "adapters"
BASE = "base of the adapters"
INNER = "inner_subsets"
"""`Subset`s in the data set but for the outermost, which is `subset`."""
PROBES = 64
"""Values of each frozen tensor that are compared."""


class SettingsKeeper(TrainerCallback):
    """Write the settings of a training into each checkpoint that `Trainer` saves.

    `resumed`: the checkpoint that it starts from, whose number of steps is compared.
    `is_complete`: whether all steps were done when the training began.
    """

    def __init__(self, settings: dict[str, Any], resumed: Path | None = None) -> None:
        self.settings, self.resumed = settings, resumed
        self.is_complete = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note whether all steps are done already; print what another number of steps changes."""
        self.is_complete = bool(self.resumed) and state.global_step >= state.max_steps
        if self.is_complete:
            done = f"{state.global_step} of {state.max_steps} steps"
            say_once([f"nothing to train: {self.resumed} has {done}"])
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


def settings_of(collator: StoreCollator, data: Any, args: Any, model: Any) -> dict[str, Any]:
    """Return what a resumed training compares: loss, stores, samples' extent, `ARGUMENTS`.

    Of a model with adapters also their settings and values of the weights beneath them.
    """
    loss = loss_settings(collator.config)
    if (loss["sft_weight"], loss["kd_weight"]) == (None, None):
        loss["alpha"] = collator.config.weights[1]
    known, chosen = datasets_in(data), _indices(data)
    stores = [store for one in known for store in one.stores] or collator.stores
    settings = {
        **loss,
        "stores": [store.fingerprint for store in stores],
        "samples": len(data) if hasattr(data, "__len__") else None,
        "longest_sample": max((one.longest for one in known), default=None),
        "subset": None if chosen is None else sha256_of_json(chosen),
        INNER: _inner_subsets(data),
        **_arguments(args),
        **_adapters(model),
    }
    found: dict[str, Any] = decode_json(canonical_json(settings))
    return found


def _indices(data: Any) -> list[int] | None:
    """Return the indices of torch's `Subset`; None for a data set of another kind."""
    indices = getattr(data, "indices", None)
    return None if indices is None else [int(index) for index in indices]


def _inner_subsets(data: Any) -> str | None:
    """Return a hash of the indices in all data sets that `data` has; None if there are none."""
    inner = [_tree(one) for one in wrapped_in(data)]
    return sha256_of_json(inner) if any(inner) else None


def _tree(data: Any) -> list[Any]:
    """Return [indices, [the same of each inner data set]]; [] without any indices."""
    own, inner = _indices(data), [_tree(one) for one in wrapped_in(data)]
    return [] if own is None and not any(inner) else [own, inner]


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


def _adapters(model: Any) -> dict[str, Any]:
    """Return the settings of peft's adapters, by name, and a hash of their base; {} without any.

    Of each frozen tensor, `PROBES` values are hashed, rounded to bf16: that tells two models apart
    at no cost, and not two dtypes of one.
    """
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        return {}
    found = {
        f"{ADAPTERS}.{name}.{key}": json.loads(json.dumps(value, default=_plain, sort_keys=True))
        for name, config in configs.items()
        for key, value in config.to_dict().items()
        if key not in OF_THE_FILE
    }
    probes = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not parameter.numel() or parameter.is_meta:
            continue  # empty: DeepSpeed has cut it over the processes
        flat = parameter.detach().reshape(-1)
        chosen = torch.arange(PROBES, device=flat.device) * (len(flat) - 1) // (PROBES - 1)
        probes[name] = flat[chosen].to("cpu", torch.bfloat16).view(torch.int16).tolist()
    return {**found, **({BASE: sha256_of_json(probes)} if probes else {})}


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def check_start(args: Any) -> None:
    """Raise NemoKDError if a training from the start would save among another one's checkpoints.

    `Trainer` deletes the checkpoints with the lowest numbers, whosever they are, and resumes the
    one with the highest.
    """
    saves = getattr(args.save_strategy, "value", args.save_strategy) != "no"
    found = checkpoints_in(Path(args.output_dir)) if saves else []
    if found:
        raise NemoKDError(
            f"{found[-1]} is of an earlier training, with whose checkpoints this one's would be "
            "mixed: resume it with train(resume_from_checkpoint=True), or train into another "
            "output_dir"
        )


def check_resumed(checkpoint: Path, settings: dict[str, Any]) -> None:
    """Compare with the settings of a checkpoint.

    Those without the file are resumed with a line, as are settings that an earlier version did not
    keep.

    Errors: NemoKDError, naming each difference, and for a checkpoint without its optimizer.
    """
    refuse_without_optimizer(checkpoint)
    file = checkpoint / FILE
    if not file.is_file():
        missing = FILE_IS_MISSING.format(checkpoint, FILE)
        say_once([f"{missing}; Trainer keeps its learning rate, weight decay and batch size"])
        return
    then = read_json(file)
    of_these = (ADAPTERS, BASE, *([INNER] if settings[INNER] is not None else []))
    compared = [*ARGUMENTS, *(name for name in settings if name.startswith(of_these))]
    if absent := [name for name in compared if name not in then]:
        say_once([f"{file} has no {', '.join(absent)}, so they were not compared"])
    names = [name for name, value in settings.items() if then.get(name) != value]
    changed = differing([name for name in names if name not in absent], then, settings)
    remedy = f"train into another output_dir, or delete {file} to resume with the new ones"
    if reasons := dict.fromkeys(ARGUMENTS[name] for name in changed if name in ARGUMENTS):
        remedy = f"or train into another output_dir: {', and '.join(reasons)}"
    refuse_changed(checkpoint, changed, then, settings, remedy)
