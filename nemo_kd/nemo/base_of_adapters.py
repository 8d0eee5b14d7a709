"""Compare the model that restored adapters are put on with the one that they were trained on.

Adapters fit any model of the same shapes, and compute nonsense on another one. Equal fingerprints
are equal files. Different ones prove nothing, since a model can be saved in several ways: then the
weights are compared. What differs is refused; what cannot be compared is printed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from nemo_kd.checkpoints.config_json import read_model
from nemo_kd.checkpoints.export import config_of
from nemo_kd.checkpoints.model import CheckpointError
from nemo_kd.checkpoints.recorded_base import check_base, tensors_of
from nemo_kd.checkpoints.source import EMBEDDING, LM_HEAD, Source, open_source
from nemo_kd.checkpoints.weights import Weights
from nemo_kd.errors import NemoKDError
from nemo_kd.nemo.record import Origin, read
from nemo_kd.store.fingerprint import checkpoint_fingerprint
from nemo_kd.visible import say

BASE_KEY = "kd_base"
"""Key of the model's configuration in which a `.nemo` of adapters records their base."""


def absolute(base: Origin) -> Origin:
    """Return a base as a `.nemo` records it: it may be read from another directory."""
    return {**base, "path": str(Path(base["path"]).absolute())}


def check_base_of_adapters(cfg: DictConfig) -> None:
    """Check the base of `model.peft.restore_from_path`, if it is set, on rank 0.

    Collectives: a broadcast of the refusal.

    Errors: NemoKDError on every rank if `model.restore_from_path` has other weights.
    """
    path = cfg.model.peft.restore_from_path
    if not path:
        return
    refusal: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            notice = compared(str(path), str(cfg.model.restore_from_path))
            if notice is not None:
                say(notice)
        except CheckpointError as error:
            refusal = [str(error)]
    torch.distributed.broadcast_object_list(refusal)
    if refusal[0] is not None:
        raise NemoKDError(f"model.restore_from_path={cfg.model.restore_from_path}: {refusal[0]}")


def compared(adapters: str, given: str) -> str | None:
    """Return None if `given` is the base of the adapters, else why it cannot be compared with it.

    Errors: CheckpointError if both can be read and their weights differ.
    """
    base = _recorded(adapters)
    if base is None:
        return f"{adapters} does not record its base; {given} is taken for it"
    path, then = Path(base["path"]), base.get("fingerprint")
    now = checkpoint_fingerprint(Path(given), then)
    if now == then:
        return None
    named = f"WARNING: {adapters} was trained on {path}"
    if not path.exists():
        return f"{named}, which is gone; {given} is taken for it"
    there = checkpoint_fingerprint(path, then)
    if then is not None and there != then:
        return f"{named}, which has changed since; {given} is taken for it"
    if now == there:
        return None
    try:
        source = open_source(given)
        weights = _weights(source)
    except CheckpointError as error:
        return f"{named}, which cannot be compared with {given} ({error}); it is taken for it"
    recorded = Source(Path(adapters), {}, {"restore_from_path": str(path)}, None)
    return check_base(recorded, given, weights.model, tensors_of(weights))


def _recorded(adapters: str) -> Origin | None:
    """Return path and fingerprint of the base that a `.nemo` or a checkpoint of adapters records.

    Earlier versions recorded the path only.
    """
    if adapters.endswith(".ckpt"):
        return read(adapters)[1].student
    section: Mapping[str, Any] = open_source(adapters).section or {}
    if section.get(BASE_KEY):
        return dict(section[BASE_KEY])
    path = section.get("restore_from_path")
    return None if path is None else {"path": str(path)}


def _weights(source: Source) -> Weights:
    """Return the weights of a source, all rows of the embedding included.

    Errors: CheckpointError for a model of an architecture that `checkpoints` does not know.
    """
    if source.weights is None:
        raise CheckpointError(f"{source.path} has adapters only")
    config, shapes = config_of(source, None), source.weights.shapes
    config["vocab_size"] = shapes[f"{source.prefix}{EMBEDDING}"][0]
    tied = f"{source.prefix}{LM_HEAD}" not in shapes
    return Weights(source.weights, source.prefix, replace(read_model(config), tied=tied))
