"""A student for trainers of transformers' kind: a checkpoint, or some of its layers."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from nemo_kd.checkpoints import open_checkpoint, parse_layers
from nemo_kd.checkpoints.huggingface import to_transformers
from nemo_kd.errors import NemoKDError
from nemo_kd.files import read_json
from nemo_kd.hf.generation import make_savable
from nemo_kd.hf.loading import from_directory
from nemo_kd.lock import LOCK, DirectoryLock
from nemo_kd.sft.tokenizer import load_tokenizer
from nemo_kd.teacher.processes import Launch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_student(path: str | Path, keep_layers: str | None = None) -> tuple[PreTrainedModel, Any]:
    """Load (model in float32, tokenizer) of a Hugging Face directory or a `.gguf` file.

    `keep_layers` prunes a convertible model as examples/convert_hf_to_nemo.py does: layer
    numbers such as `0,1,8-11`, or `@FILE`. Nothing is downloaded and no code is run.

    Errors: NemoKDError for a checkpoint that cannot be loaded completely, or not pruned.
    """
    path = Path(path)
    if path.is_dir() and keep_layers is None:
        model = from_directory(path, torch.float32)
        make_savable(model)
        return model, load_tokenizer(path)
    checkpoint = open_checkpoint(path)
    model = to_transformers(checkpoint, parse_layers(keep_layers, checkpoint.model.num_layers))
    with tempfile.TemporaryDirectory() as directory:
        checkpoint.save_tokenizer(directory)
        tokenizer = load_tokenizer(directory)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for config in (model.config, model.generation_config):
            setattr(config, name, getattr(tokenizer, name))
    whole = path / GENERATION_CONFIG_NAME
    if whole.is_file():  # such as several ends of an answer
        model.generation_config = GenerationConfig.from_dict(read_json(whole))
    make_savable(model)
    return model, tokenizer


@contextmanager
def new_output(output: str | Path) -> Iterator[None]:
    """Keep a new or empty directory from other jobs until the student is saved in it.

    Rank 0 holds the lock; that of a job that was killed is taken over.

    Errors: LockedError if another job holds it, NemoKDError if the directory is filled.
    """
    is_first = Launch.of(os.environ).rank == 0
    with DirectoryLock(output) if is_first else nullcontext():
        _refuse_filled(output)
        yield


def _refuse_filled(output: str | Path) -> None:
    """Raise NemoKDError unless `output` has nothing but a lock.

    `save_pretrained` leaves the files of an earlier student: beside an `adapter_config.json` of it
    `from_pretrained` would ignore the new weights.
    """
    output = Path(output)
    if output.is_dir() and any(not one.name.startswith(LOCK) for one in output.iterdir()):
        raise NemoKDError(
            f"{output} is not an empty directory, and the student would be mixed with what it "
            "holds; choose another --output, or move it away"
        )
