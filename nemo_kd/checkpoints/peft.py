"""Write LoRA adapters of NeMo as a directory of the PEFT library.

Format: huggingface.co/docs/peft, "PEFT checkpoint format".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nemo_kd.checkpoints import open_checkpoint, safetensors_file
from nemo_kd.checkpoints.card import FILE as CARD
from nemo_kd.checkpoints.card import STEPS, Card, model_card
from nemo_kd.checkpoints.config_json import read_model
from nemo_kd.checkpoints.directory import dump, new_directory
from nemo_kd.checkpoints.export import CONFIG as HF_CONFIG
from nemo_kd.checkpoints.export import config_of
from nemo_kd.checkpoints.exported_tokenizer import tokenizer_of
from nemo_kd.checkpoints.lora import Adapters, open_adapters, split
from nemo_kd.checkpoints.model import CheckpointError, Model
from nemo_kd.checkpoints.recorded_base import check_base, tensors_in
from nemo_kd.checkpoints.safetensors_file import Entry
from nemo_kd.checkpoints.source import CONVERTED, Source, open_source
from nemo_kd.visible import say

CONFIG, SINGLE = "adapter_config.json", "adapter_model.safetensors"


def export_adapters(
    path: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    card: Card | None = None,
) -> int:
    """Write the adapters at `path` to the directory `output`; return their number.

    `base` is the Hugging Face directory of the model that they belong to; None: the one from which
    it was converted. Prints a line if it cannot be compared with the base of the adapters'
    training.
    Errors: CheckpointError for a base that is not an unchanged conversion, for one of other weights
    than that of the training, and those of `open_adapters`.
    """
    source = open_source(path)
    config = config_of(source, base)
    config.setdefault("vocab_size", 1)
    name = str(Path(base).resolve()) if base is not None else _recorded(source)
    model = read_model(config)
    adapters = open_adapters(path, model)
    if base is not None:
        note = _check_base(source, base, model)
        if note is not None:
            say(note)
    loaded = tokenizer_of(source, base, tokenizer)
    tensors = list(split(adapters, model))
    entries = [Entry(key, tuple(one.shape), dtype or one.dtype) for key, one in tensors]
    inputs = [one for one in (path, base, tokenizer) if one is not None]
    with new_directory(output, inputs, overwrite=overwrite) as new:
        loaded.save_pretrained(str(new))
        dump(
            new / CONFIG, peft_config(adapters, [key for key, _ in tensors], name, model.num_layers)
        )
        text = model_card(card or Card(), source, config, adapted=name)
        (new / CARD).write_text(text, encoding="utf-8")
        files = [*(one.name for one in new.iterdir()), SINGLE]
        for _ in safetensors_file.write(new, {SINGLE: entries}, iter(tensors), files):
            pass
    return len(adapters.pairs)


def _check_base(source: Source, base: str | Path, model: Model) -> str | None:
    """As `check_base`, for a Hugging Face directory, which may have no weights beside the rest."""
    try:
        checkpoint = open_checkpoint(base)
    except CheckpointError as error:
        return f"{source.path}: {base} cannot be compared with its base ({error})"
    return check_base(source, base, model, tensors_in(checkpoint))


def _recorded(source: Source) -> str:
    """The Hugging Face directory with the weights on which the adapters were trained.

    Errors: CheckpointError if their base is not the unchanged conversion of one, or not found.
    """
    nemo = (source.section or {}).get("restore_from_path")
    try:
        section = open_source(str(nemo)).section or {} if nemo else {}
        reason = f"its base {nemo} {_changed(section)}" if nemo else "it does not record its base"
    except CheckpointError as error:
        section, reason = {}, f"its base cannot be read: {error}"
    if section and not _changed(section):
        directory = Path(section[CONVERTED]["checkpoint"]).absolute()
        if (directory / HF_CONFIG).is_file():
            return str(directory)
        reason = f"its base {nemo} was converted from {directory}, where there is no {HF_CONFIG}"
    raise CheckpointError(
        f"{source.path}: {reason}; give --base, the Hugging Face directory of its base "
        "(nemo-kd export writes one)"
    )


def _changed(section: Mapping[str, Any]) -> str:
    """How a model's weights differ from those of the directory it was converted from, or ""."""
    converted = section.get(CONVERTED)
    if not isinstance(converted, Mapping):
        return "was not converted from a Hugging Face directory"
    if STEPS in section or section.get("restore_from_path"):
        return "was trained after its conversion"
    if len(converted["layers"]) != (converted.get("config") or {}).get("num_hidden_layers"):
        return "has not all layers of the directory it was converted from"
    return ""


def peft_config(adapters: Adapters, names: list[str], base: str, num_layers: int) -> dict[str, Any]:
    """adapter_config.json for tensors `names`; `base` is the model's directory."""
    layers = sorted({layer for layer, _ in adapters.pairs})
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": adapters.dim,
        "lora_alpha": adapters.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted({name.split(".")[-3] for name in names}),
    }
    if len(layers) < num_layers:
        config |= {"layers_to_transform": layers, "layers_pattern": "layers"}
    return config
