"""Write a model of NeMo or Megatron-core as a Hugging Face directory.

    config.json, model.safetensors (or several, with an index), the tokenizer,
    generation_config.json, README.md

Weights are read, split by `families.py` and written one Megatron tensor at a time, from any layout
of ranks. The directory appears under its name when it is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nemo_kd.checkpoints import nemo_settings, safetensors_file
from nemo_kd.checkpoints.card import FILE as CARD
from nemo_kd.checkpoints.card import STEPS, Card, model_card
from nemo_kd.checkpoints.config_json import read_model
from nemo_kd.checkpoints.directory import dump, new_directory
from nemo_kd.checkpoints.exported_tokenizer import tokenizer_of
from nemo_kd.checkpoints.families import family_of
from nemo_kd.checkpoints.huggingface import read_object
from nemo_kd.checkpoints.lora import MergedWeights, open_adapters
from nemo_kd.checkpoints.model import CheckpointError, Model, reading
from nemo_kd.checkpoints.recorded_base import check_base, tensors_of
from nemo_kd.checkpoints.safetensors_file import Entry
from nemo_kd.checkpoints.source import CONFIG as NEMO_CONFIG
from nemo_kd.checkpoints.source import CONVERTED, EMBEDDING, LM_HEAD, Source, open_source
from nemo_kd.checkpoints.trained_arguments import check_arguments
from nemo_kd.checkpoints.verify import Verified, verify_export
from nemo_kd.checkpoints.weights import Weights
from nemo_kd.visible import say
from nemo_kd.vocabulary import VocabularySize

CONFIG, GENERATION = "config.json", "generation_config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    path: Path
    model: Model
    parameters: int
    nbytes: int
    dtype: torch.dtype
    stored_rows: int
    """Rows of the embedding in the checkpoint, padding included."""
    verified: Verified | None


@dataclass(frozen=True)
class Student:
    """A model to export: all that is written, but for the weights themselves."""

    source: Source
    record: Source
    """The source whose configuration records the training: the adapters, if any were merged."""
    model: Model
    config: dict[str, Any]
    tokenizer: Any
    generation: dict[str, Any]
    weights: Weights


def open_student(
    path: str | Path,
    base: str | Path | None = None,
    tokenizer: str | Path | None = None,
    base_model: str | Path | None = None,
) -> Student:
    """Open the model at `path` and check that all of it can be exported.

    `base` is a Hugging Face directory whose config.json describes the model, `tokenizer` one that
    replaces the model's own. With `base_model`, `path` has LoRA adapters, which are merged into it.
    Prints a line for what cannot be checked.
    Errors: CheckpointError for a model that a config.json cannot describe, and for a `base_model`
    other than that of the adapters' training.
    """
    source = open_source(path if base_model is None else base_model)
    if source.weights is None:
        raise CheckpointError(
            f"{source.path} has adapters only: give the model that they were trained on by "
            "--base-model to merge them, or --peft to write them for the PEFT library"
        )
    name = str(source.path)
    config = config_of(source, base)
    loaded = tokenizer_of(source, base, tokenizer)
    vocabulary = VocabularySize.of(loaded)
    if tokenizer is not None:
        _refuse_smaller(source, base, vocabulary, tokenizer)
    stored = source.weights.shapes.get(f"{source.prefix}{EMBEDDING}")
    if stored is None:
        raise CheckpointError(f"{name} has no {EMBEDDING}; is it a language model?")
    trained = base_model is not None or STEPS in (source.section or {})
    untouched = config.get("vocab_size") == stored[0] and not trained
    rows = _rows(source, stored[0], vocabulary, all_of_them=untouched)
    config["vocab_size"] = rows
    model = read_model(config)
    tied = f"{source.prefix}{LM_HEAD}" not in source.weights.shapes
    if tied != model.tied:
        config["tie_word_embeddings"] = tied
    model = replace(model, tied=tied)
    if source.section is not None:
        nemo_settings.check(name, source.section, model)
    else:
        note = check_arguments(source, model)
        if note is not None:
            say(note)
    config.setdefault("architectures", [model.architecture])
    config.setdefault("model_type", family_of(model).model_type)
    generation = _generation(source, config, base, loaded)
    if base is None and CONVERTED not in (source.section or {}):
        config = {**generation, **config}  # the class's own ids would be another tokenizer's
    weights, record = Weights(source.weights, source.prefix, model), source
    if base_model is not None:
        adapters = open_adapters(path, model)
        note = check_base(adapters.source, base_model, model, tensors_of(weights))
        if note is not None:
            say(note)
        weights, record = MergedWeights(weights, adapters), adapters.source
    return Student(source, record, model, config, loaded, generation, weights)


def _refuse_smaller(
    source: Source, base: str | Path | None, given: VocabularySize, name: str | Path
) -> None:
    """Raise CheckpointError if the tokenizer `given` has no ids for rows that were trained."""
    try:
        own = VocabularySize.of(tokenizer_of(source, base))
    except CheckpointError:  # gone, or not read: that is why another is given
        return
    if given.ids < own.ids:
        raise CheckpointError(
            f"{name}: the tokenizer's largest id is {given.ids - 1}, but the model was trained "
            f"with ids up to {own.ids - 1}, whose rows would be lost"
        )


def config_of(source: Source, base: str | Path | None) -> dict[str, Any]:
    """The config.json that describes a source, before what the export changes."""
    if base is not None:
        return nemo_settings.both_versions(_read_json(Path(base) / CONFIG))
    if source.section is None:
        raise CheckpointError(
            f"{source.path} is a checkpoint without NeMo's configuration: give --base, a Hugging "
            "Face directory with config.json and the tokenizer of the model"
        )
    return nemo_settings.config_of(str(source.path), source.section)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; give a Hugging Face directory")
    with reading(str(path)):
        return read_object(path)


def _rows(source: Source, stored: int, vocabulary: VocabularySize, *, all_of_them: bool) -> int:
    """Rows of the embedding to write: all of an untouched conversion, else the tokenizer's ids.

    Rows beyond are Megatron's padding: no training learns them and no evaluation counts them.
    """
    if vocabulary.ids > stored:
        raise CheckpointError(
            f"{source.path}: the tokenizer's largest id is {vocabulary.ids - 1}, but the embedding "
            f"has {stored} rows; they belong to different models"
        )
    return stored if all_of_them else vocabulary.ids


def _generation(
    source: Source, config: Mapping[str, Any], base: str | Path | None, tokenizer: Any
) -> dict[str, Any]:
    """generation_config.json: the base's, else that of the conversion's source, else three ids.

    The tokenizer's end of sequence, with which answers end in training, ends a generation as well.
    """
    path = Path(base) / GENERATION if base is not None else None
    converted = (source.section or {}).get(CONVERTED) or {}
    if path is not None and path.is_file():
        found = _read_json(path)
    elif base is None and converted.get("generation_config"):
        found = dict(converted["generation_config"])
    else:
        ids = {key: config.get(key, getattr(tokenizer, key)) for key in IDS}
        found = {key: value for key, value in ids.items() if value is not None}
    ends = found.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    if tokenizer.eos_token_id not in (None, *ends):
        ends = [tokenizer.eos_token_id, *(one for one in ends if one is not None)]
        found["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return found


def _dtype(config: Mapping[str, Any], entries: Sequence[Entry]) -> dict[str, str]:
    """The type that config.json states: its own if any tensor has it, else the embedding's."""
    names = [str(entry.dtype).removeprefix("torch.") for entry in entries]
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    name = config[key] if config.get(key) in names else names[0]
    return {"torch_dtype": name} | ({"dtype": name} if "dtype" in config else {})


def export(
    student: Student,
    output: str | Path,
    *,
    inputs: tuple[str | Path, ...] = (),
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    card: Card | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
    compare: bool = False,
) -> Exported:
    """Write `student` to the directory `output`.

    `dtype` None keeps each tensor's own. `inputs` are further paths that must not be overwritten.
    `progress` is called with the bytes written and their total. With `compare`, the logits in
    transformers are compared with NeMo's, and another model is a CheckpointError.
    Errors: NemoKDError if `output` is not empty, unless an export wrote it and `overwrite` is set.
    """
    entries = [
        Entry(name, shape, dtype or kind) for name, shape, kind in student.weights.described()
    ]
    shards = safetensors_file.shards_of(entries)
    total = sum(entry.nbytes for entry in entries)
    config = student.config | _dtype(student.config, entries)
    sources = [student.source.path, student.record.path, *inputs]
    with new_directory(output, sources, overwrite=overwrite) as new:
        student.tokenizer.save_pretrained(str(new))
        dump(new / CONFIG, config)
        dump(new / GENERATION, student.generation)
        merged = None if student.record is student.source else student.source
        text = model_card(card or Card(), student.record, config, merged=merged)
        (new / CARD).write_text(text, encoding="utf-8")
        if len(shards) > 1:
            (new / safetensors_file.INDEX).write_text(
                safetensors_file.index_of(shards), encoding="utf-8"
            )
        files = [*(one.name for one in new.iterdir()), *shards]
        done = 0
        for size in safetensors_file.write(new, shards, student.weights.tensors(), files):
            done += size
            progress(done, total)
        verified = None
        if compare:
            verified = verify_export(new, student.source.path, student.model, dtype)
    return Exported(
        path=Path(output),
        model=student.model,
        parameters=sum(torch.Size(entry.shape).numel() for entry in entries),
        nbytes=total,
        dtype=entries[0].dtype,
        stored_rows=student.weights.stored_rows,
        verified=verified,
    )


def comparable(student: Student) -> str | None:
    """Why the logits of `student` cannot be compared with NeMo's; None if they can."""
    if student.source.section is None or student.source.prefix != "model.":
        return "NeMo does not load a checkpoint of Megatron-core"
    if student.record is not student.source:
        return "the adapters were merged in the export"
    if NEMO_CONFIG not in student.source.files:
        return "NeMo loads a .nemo, not a checkpoint of a training"
    return None
