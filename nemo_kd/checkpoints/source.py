"""Open what NeMo and Megatron save: a `.nemo`, packed or not, or a checkpoint of a training.

A `.nemo` has `model_config.yaml` and the weights in `model_weights/`; one of adapters has
`model_weights.ckpt` instead. A checkpoint of a training is a directory of weights and optimizer
states whose `common.pt` has, from NeMo, the configuration. Megatron-core's has the same tensors
under names without `model.`, and no configuration.
"""

from __future__ import annotations

import collections
import tarfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
import yaml
from omegaconf import AnyNode, DictConfig, ListConfig, OmegaConf
from omegaconf.base import ContainerMetadata, Metadata

from nemo_kd.checkpoints.distributed import (
    COMMON,
    METADATA,
    DistributedCheckpoint,
    Files,
    files_of,
)
from nemo_kd.checkpoints.latest import latest_directory
from nemo_kd.checkpoints.model import CheckpointError, checked, reading

CONFIG, WEIGHTS, PICKLED_WEIGHTS = "model_config.yaml", "model_weights", "model_weights.ckpt"
CONVERTED = "converted_from"
"""Key of a `.nemo`'s configuration: what the conversion that wrote it recorded."""
MAX_CONFIG = 64 << 20  # bytes
EMBEDDING, LM_HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
EXPECTED = (
    "expected a .nemo (a file or a directory), a checkpoint directory of NeMo's training, or one "
    "of Megatron-core such as iter_0000010/"
)


@dataclass(frozen=True)
class Source:
    """An opened source; only what is asked for is read."""

    path: Path
    files: Files
    """Files beside the configuration, or beside the weights of a training's checkpoint."""
    section: dict[str, Any] | None
    """NeMo's configuration of the model; None for Megatron-core's checkpoints."""
    weights: DistributedCheckpoint | None
    """None for adapters."""

    @property
    def prefix(self) -> str:
        """What the names of the weights begin with."""
        shapes = self.weights.shapes if self.weights else {}
        return "model." if f"model.{EMBEDDING}" in shapes else ""


def open_source(path: str | Path) -> Source:
    """Open a `.nemo` or a checkpoint directory.

    Errors: CheckpointError for anything else, and for what a hostile file may hold.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; {EXPECTED}")
    if path.is_file() and not tarfile.is_tarfile(path):
        raise CheckpointError(f"{path} is not a .nemo; {EXPECTED}")
    if path.is_dir():
        path = latest_directory(path) or path
    files = files_of(path)
    if CONFIG in files:
        return _of_nemo(path, files)
    if METADATA not in files:
        raise CheckpointError(f"{path} has neither {CONFIG} nor {METADATA}; {EXPECTED}")
    weights = DistributedCheckpoint(str(path), files)
    return Source(path, files, _section(path, files), weights)


def _of_nemo(path: Path, files: Files) -> Source:
    with reading(f"{path}: {CONFIG}"), files[CONFIG].open() as file:
        section = yaml.safe_load(file.read(MAX_CONFIG))
        if not isinstance(section, dict):
            raise CheckpointError(f"{path}: {CONFIG} is not a configuration")
    _check_converted(path, section)
    weights = files_of(path, WEIGHTS)
    if weights:
        return Source(path, files, section, DistributedCheckpoint(str(path), weights))
    adapted = section.get("peft")
    if isinstance(adapted, dict) and adapted.get("peft_scheme") not in (None, "none"):
        return Source(path, files, section, None)
    raise CheckpointError(
        f"{path} has no {WEIGHTS}/, and adapters neither: it is not complete; save it again"
    )


class _Converted(msgspec.Struct):
    """What a conversion records in its section."""

    checkpoint: str
    layers: list[int]
    config: dict[str, Any] | None = None
    generation_config: dict[str, Any] | None = None


def _check_converted(path: Path, section: Mapping[str, Any]) -> None:
    if section.get(CONVERTED) is not None:
        checked(f"{path}: model.{CONVERTED}", section[CONVERTED], _Converted)


PICKLED: list[Any] = [
    *(DictConfig, ListConfig, AnyNode, ContainerMetadata, Metadata),
    *(dict, list, int, Any, collections.defaultdict),
]
"""What the checkpoints of NeMo's training pickle, besides tensors."""


def unpickles() -> AbstractContextManager[None]:
    """Context in which torch's restricted unpickler creates PICKLED; may be nested.

    The end of torch's own context forgets what an outer one has added.
    """
    known = torch.serialization.get_safe_globals()
    return torch.serialization.safe_globals([part for part in PICKLED if part not in known])


def _section(path: Path, files: Files) -> dict[str, Any] | None:
    """NeMo's section in a training's checkpoint; None in one of Megatron-core."""
    if COMMON not in files:
        return None
    try:
        with unpickles(), files[COMMON].open() as file:
            common = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # of Megatron-LM: its arguments are objects, which are not created
        return None
    given = common.get("hyper_parameters") if isinstance(common, Mapping) else None
    section = given.get("cfg") if isinstance(given, (Mapping, DictConfig)) else None
    if section is None:
        return None
    with reading(f"{path}: {COMMON}", "its configuration is damaged"):
        container = OmegaConf.to_container(OmegaConf.create(section), resolve=True)
        assert isinstance(container, dict)
        found = {str(key): value for key, value in container.items()}
        _check_converted(path, found)
        return found
