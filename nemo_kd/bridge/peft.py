"""Adapters in Megatron-Bridge: the student that they are trained on, and their export."""

from __future__ import annotations

import shutil
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import torch
from megatron.bridge import AutoBridge
from megatron.bridge.peft.base import PEFT
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.model_load_save import (
    save_megatron_model,
    temporary_distributed_context,
)
from megatron.core import dist_checkpointing

from nemo_kd.bridge.export import new_export
from nemo_kd.checkpoints.latest import latest, latest_directory
from nemo_kd.data.resumed import FILE
from nemo_kd.errors import NemoKDError
from nemo_kd.files import read_json

BASE = "pretrained"
"""Directory of the student's weights in that of a training's checkpoints."""


def keep_student(config: ConfigContainer) -> None:
    """Have the student's weights written in Megatron's format, from which Bridge loads a base.

    With `config.peft` Bridge reads the weights below the adapters only from a checkpoint of its own
    format. Without `checkpoint.pretrained_checkpoint`, the weights that the model loads from the
    Hugging Face directory are written beside the adapters' checkpoints, by all ranks, before the
    first step. A continued training finds them there.

    Errors: NemoKDError if there is nowhere to write them, if the model loads no weights, or if a
    continued training does not find them.
    """
    checkpoint, model = config.checkpoint, config.model
    if config.peft is None or checkpoint.pretrained_checkpoint is not None:
        return
    if checkpoint.save is None or model.pre_wrap_hook is None:
        raise NemoKDError(
            f"peft={type(config.peft).__name__} needs the student's weights in Megatron's format: "
            "set checkpoint.save and take the model of finetune_config, or set "
            "checkpoint.pretrained_checkpoint"
        )
    base = Path(checkpoint.save, BASE)
    checkpoint.pretrained_checkpoint = str(base)
    if checkpoint.load is None or latest(checkpoint.load) is None:
        base.mkdir(parents=True, exist_ok=True)  # Bridge 0.6 looks for it before the model is built
        model.register_pre_wrap_hook(lambda chunks: _written(chunks, base, config.dataset.student))
    elif latest(base) is None:
        raise NemoKDError(
            f"{checkpoint.load} has adapters, but {base} lacks the student that they belong to: "
            "set checkpoint.pretrained_checkpoint to where it is"
        )


def described(peft: PEFT | None) -> str | None:
    """Name the adapters and their settings other than the defaults; None without adapters."""
    if peft is None:
        return None
    given = [
        f"{one.name}={getattr(peft, one.name)}"
        for one in fields(peft)
        if one.init and getattr(peft, one.name) != _default(one)  # others change while it trains
    ]
    return f"{type(peft).__name__}({', '.join(given)})"


def _default(one: Field[Any]) -> Any:
    return one.default if one.default_factory is MISSING else one.default_factory()


def _written(chunks: list[Any], base: Path, tokenizer: str | None) -> list[Any]:
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(base, ignore_errors=True)  # of a training without a checkpoint
    torch.distributed.barrier()
    kwargs = {"use_fast": True}
    save_megatron_model(chunks, base, hf_tokenizer_path=tokenizer, hf_tokenizer_kwargs=kwargs)
    return chunks


def export_merged(
    student: str | Path,
    checkpoints: str | Path,
    output: str | Path,
    peft: PEFT,
    *,
    base: str | Path | None = None,
) -> None:
    """Write the student with the adapters of the last checkpoint merged into its weights.

    `student`: the Hugging Face directory that was trained. `checkpoints`: `checkpoint.save` of the
    training. `output`: a Hugging Face directory. `peft`: that of the training, such as
    `LoRA(dim=16)`. `base`: `checkpoint.pretrained_checkpoint`, if it was set. One process, after
    the training.

    Errors: NemoKDError if the training recorded other adapters than `peft`, and if `output` is an
    input or has files that no export wrote.
    """
    file = Path(checkpoints, FILE)
    trained = read_json(file).get("peft") if file.is_file() else None
    if trained not in (None, described(peft)):
        raise NemoKDError(
            f"{checkpoints} has adapters of {trained}, but peft is {described(peft)}: give the "
            "same as in the training"
        )
    bridge = AutoBridge.from_hf_pretrained(
        str(student), local_files_only=True, trust_remote_code=False
    )
    last = latest_directory(checkpoints)
    if last is None:
        raise NemoKDError(f"{checkpoints} has no checkpoint; give checkpoint.save of the training")
    with (
        temporary_distributed_context(backend="gloo"),
        new_export(output, student, checkpoints) as new,
    ):
        model: Any = bridge.load_megatron_model(base or Path(checkpoints, BASE))
        model = peft(model, training=False)
        metadata = dist_checkpointing.load_content_metadata(str(last))
        parts = model[0].sharded_state_dict(metadata=metadata)
        own = {name: part for name, part in parts.items() if peft.adapter_key_filter(name)}
        stored = dist_checkpointing.load({"model": own}, str(last))
        model[0].load_state_dict(stored["model"], strict=False)
        bridge.save_hf_pretrained(model, str(new))
