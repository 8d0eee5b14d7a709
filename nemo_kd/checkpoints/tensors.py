"""A model's tensors under Megatron's names, read one at a time from any kind of checkpoint."""

from __future__ import annotations

import re
from typing import Protocol

import torch

from nemo_kd.checkpoints.distributed import DistributedCheckpoint
from nemo_kd.checkpoints.families import parts_of
from nemo_kd.checkpoints.model import Checkpoint, CheckpointError
from nemo_kd.checkpoints.source import Source
from nemo_kd.checkpoints.weights import OF_MODEL

LAYERS = "decoder.layers."


class MegatronTensors(Protocol):
    """The tensors of a model.

    Names are those of TransformerEngine's layers: `embedding.word_embeddings.weight`, and without a
    number for those of a layer (`decoder.layers.mlp.linear_fc1.weight`) or an expert
    (`decoder.layers.mlp.experts.experts.linear_fc1.weight`).
    """

    name: str

    @property
    def names(self) -> set[str]:
        """All names that the checkpoint has."""

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""

    def read(self, name: str, layer: int | None = None, expert: int | None = None) -> torch.Tensor:
        """The tensor of a name, of a layer and an expert; CheckpointError if there is none."""


class HuggingFaceTensors:
    """The tensors of a Hugging Face directory or a GGUF file, joined as Megatron has them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.name = checkpoint, checkpoint.name
        self.num_layers = checkpoint.model.num_layers
        self._parts = {
            (LAYERS * (layer is not None) + part.megatron, layer, (part.expert or (None,))[0]): part
            for part, layer in parts_of(checkpoint.model)
        }

    @property
    def names(self) -> set[str]:
        return {name for name, _, _ in self._parts}

    def read(self, name: str, layer: int | None = None, expert: int | None = None) -> torch.Tensor:
        part = self._parts.get((name, layer, expert))
        if part is None:
            raise CheckpointError(f"{self.name} lacks {name}; it is another model")
        return part.join([self.checkpoint.tensor(one) for one in part.shapes])


class DistributedTensors:
    """The tensors of a distributed checkpoint, of NeMo or Megatron-core.

    Layers are slices of one tensor, or tensors of their own where they may differ.
    """

    def __init__(self, source: Source) -> None:
        if source.weights is None:
            raise CheckpointError(
                f"{source.path} has adapters only; merge them with their model first"
            )
        self.checkpoint: DistributedCheckpoint = source.weights
        self.name, self._prefix = str(source.path), source.prefix
        own = tuple(f"{self._prefix}{start}" for start in OF_MODEL)
        shapes = {
            key.removeprefix(self._prefix): shape
            for key, shape in self.checkpoint.shapes.items()
            if key.startswith(own) and not key.endswith("_extra_state")
        }
        numbered = {key: NUMBER.match(key) for key in shapes}
        self._keys = set(shapes)
        self.names = {
            key if match is None else LAYERS + key[match.end() :] for key, match in numbered.items()
        }
        counts = [
            shapes[key][0] if match is None else int(match[1]) + 1
            for key, match in numbered.items()
            if key.startswith(LAYERS)
        ]
        self.num_layers = max(counts, default=0)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor outside the layers."""
        if name not in self.names:
            if any(".adapter." in own for own in self.names):
                raise CheckpointError(
                    f"{self.name} has only adapters; merge them into their model, and take that"
                )
            raise CheckpointError(f"{self.name} lacks {name}; is it a language model?")
        return self.checkpoint.shapes[self._prefix + name]

    def read(self, name: str, layer: int | None = None, expert: int | None = None) -> torch.Tensor:
        at = [] if expert is None else [expert]
        key = name
        if layer is not None and name not in self._keys:
            key = f"{LAYERS}{layer}.{name.removeprefix(LAYERS)}"
        elif layer is not None:
            at.insert(0, layer)
        return self.checkpoint.read(self._prefix + key, at)


NUMBER = re.compile(r"decoder\.layers\.(\d+)\.")
