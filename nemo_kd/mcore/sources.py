"""Open what a Megatron-core model is loaded from: its settings, its tensors and its tokenizer."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemo_kd.checkpoints import nemo_settings, open_checkpoint
from nemo_kd.checkpoints.arguments import read_arguments
from nemo_kd.checkpoints.config_json import read_model
from nemo_kd.checkpoints.exported_tokenizer import own_directory, tokenizer_of
from nemo_kd.checkpoints.model import CheckpointError
from nemo_kd.checkpoints.run_config import read_run_config
from nemo_kd.checkpoints.source import EMBEDDING, LM_HEAD, Source, open_source
from nemo_kd.checkpoints.tensors import (
    DistributedTensors,
    HuggingFaceTensors,
    MegatronTensors,
)
from nemo_kd.mcore.arguments import settings_of_arguments
from nemo_kd.mcore.gpt import VOCABULARY_MULTIPLE, GPTSettings, settings_of
from nemo_kd.sft.tokenizer import HFTokenizer


@dataclass(frozen=True)
class Opened:
    """An opened checkpoint: nothing but its metadata is read yet."""

    path: Path
    settings: GPTSettings
    tensors: MegatronTensors
    tokenizer: HFTokenizer
    tokenizer_path: str | None
    """None for a tokenizer that was converted, and cannot be loaded again."""


def open_model(
    path: str | Path,
    *,
    tokenizer: str | Path | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Opened:
    """Open a Hugging Face directory, a GGUF, a `.nemo` or a checkpoint of Megatron-LM or -Bridge.

    `tokenizer`: a Hugging Face directory; None takes the checkpoint's own. `arguments`: those of
    Megatron-LM that a checkpoint of it lacks.

    Errors: CheckpointError for a checkpoint that is not one of these, or that lacks a setting.
    """
    path = Path(path)
    if (path / "config.json").is_file() or path.suffix == ".gguf":
        _refuse_arguments(path, arguments)
        return _huggingface(path, tokenizer)
    source = open_source(path)
    if source.section is not None:
        _refuse_arguments(path, arguments)
        return _of_nemo(source, tokenizer)
    stored = read_run_config(source)
    stored = read_arguments(source) if stored is None else stored
    return _of_megatron(source, stored, arguments or {}, tokenizer)


def _refuse_arguments(path: Path, arguments: Mapping[str, Any] | None) -> None:
    if arguments:
        raise CheckpointError(
            f"{path} has its own settings, beside which {next(iter(arguments))} cannot be given; "
            "arguments are for Megatron-LM's checkpoints"
        )


def _huggingface(path: Path, tokenizer: str | Path | None) -> Opened:
    checkpoint = open_checkpoint(path)
    settings, tensors = settings_of(checkpoint.model), HuggingFaceTensors(checkpoint)
    if tokenizer is None and path.is_dir():
        tokenizer = path
    if tokenizer is not None:
        return Opened(path, settings, tensors, *_loaded(tokenizer))
    with tempfile.TemporaryDirectory() as directory:
        checkpoint.save_tokenizer(directory)
        return Opened(path, settings, tensors, HFTokenizer(directory), None)


def _of_nemo(source: Source, tokenizer: str | Path | None) -> Opened:
    """Open a .nemo, whose settings must be those of one of `checkpoints.families`."""
    assert source.section is not None
    tensors = DistributedTensors(source)
    config = nemo_settings.config_of(str(source.path), source.section)
    config["vocab_size"] = tensors.shape(EMBEDDING)[0]
    model = replace(read_model(config), tied=LM_HEAD not in tensors.names)
    nemo_settings.check(str(source.path), source.section, model)
    multiple = source.section.get("make_vocab_size_divisible_by") or VOCABULARY_MULTIPLE
    settings = replace(
        settings_of(model),
        vocabulary_multiple=multiple,
        max_tokens=source.section.get("max_tokens"),
    )
    directory = own_directory(source) if tokenizer is None else tokenizer
    if directory is not None:
        return Opened(source.path, settings, tensors, *_loaded(directory))
    with tempfile.TemporaryDirectory() as converted:
        tokenizer_of(source).save_pretrained(converted)
        return Opened(source.path, settings, tensors, HFTokenizer(converted), None)


def _of_megatron(
    source: Source,
    stored: Mapping[str, Any],
    given: Mapping[str, Any],
    tokenizer: str | Path | None,
) -> Opened:
    """Open a checkpoint of Megatron-LM or Megatron-Bridge, whose settings are its arguments."""
    tensors = DistributedTensors(source)
    settings = settings_of_arguments(str(source.path), stored, given)
    settings = replace(settings, vocab_size=tensors.shape(EMBEDDING)[0])
    if tokenizer is None:
        own = source.path / "tokenizer"  # of Bridge
        if not (own / "tokenizer_config.json").is_file():
            own = Path(str(stored.get("tokenizer_model")))
        if stored.get("tokenizer_type") != "HuggingFaceTokenizer" or not own.is_dir():
            raise CheckpointError(
                f"{source.path} names no directory of a Hugging Face tokenizer that exists; give "
                "one as teacher.tokenizer"
            )
        tokenizer = str(own)
    return Opened(source.path, settings, tensors, *_loaded(tokenizer))


def _loaded(tokenizer: str | Path) -> tuple[HFTokenizer, str]:
    directory = str(Path(tokenizer).absolute())
    return HFTokenizer(directory), directory
