"""The weights of a Megatron checkpoint under Hugging Face's names, read one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from nemo_kd.checkpoints.distributed import DistributedCheckpoint
from nemo_kd.checkpoints.families import Part, parts_of
from nemo_kd.checkpoints.model import CheckpointError, Model
from nemo_kd.checkpoints.source import EMBEDDING

OF_MODEL = ("embedding.", "decoder.", "output_layer.")
"""What the names of a language model's weights begin with; others are the optimizer's."""


class Weights:
    """Weights of `model`; all names and shapes are checked when it is created."""

    def __init__(self, checkpoint: DistributedCheckpoint, prefix: str, model: Model) -> None:
        self.checkpoint, self.prefix, self.model = checkpoint, prefix, model
        self.stored_rows = checkpoint.shapes[f"{prefix}{EMBEDDING}"][0]
        self._check()

    def described(self) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
        """Yield name, shape and type of each tensor of Hugging Face, in the order of `tensors`."""
        for part, layer in parts_of(self.model):
            dtype = self.checkpoint.dtype(self._key(part, layer)[0])
            for name, shape in part.shapes.items():
                yield name, shape, dtype

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each of Hugging Face's tensors."""
        for part, layer in parts_of(self.model):
            yield from zip(part.shapes, part.split(self.read(part, layer)), strict=True)

    def read(self, part: Part, layer: int | None) -> torch.Tensor:
        """Megatron's tensor, without the padding of a vocabulary."""
        key, at = self._key(part, layer)
        tensor = self.checkpoint.read(key, at)
        return tensor[: self.model.vocab_size] if part.vocabulary else tensor

    def _key(self, part: Part, layer: int | None) -> tuple[str, list[int]]:
        """Key in the checkpoint, and the position along its first axes."""
        if layer is None:
            return f"{self.prefix}{part.megatron}", []
        expert = [part.expert[0]] if part.expert else []
        stacked = f"{self.prefix}decoder.layers.{part.megatron}"
        single = f"{self.prefix}decoder.layers.{layer}.{part.megatron}"
        if stacked not in self.checkpoint.shapes and single in self.checkpoint.shapes:
            return single, expert  # of models whose layers may differ
        return stacked, [layer, *expert]

    def _check(self) -> None:
        """Raise CheckpointError unless the checkpoint has exactly the model's tensors."""
        shapes, expected = self.checkpoint.shapes, set()
        for part, layer in parts_of(self.model):
            key, at = self._key(part, layer)
            wanted = self._shape(part, len(at) - bool(part.expert))
            expected.add(key)
            if key not in shapes:
                raise CheckpointError(
                    f"{self.checkpoint.name} lacks {key}, which a {self.model.architecture} of its "
                    "configuration has; is it another model?"
                )
            if shapes[key] != wanted:
                raise CheckpointError(
                    f"{self.checkpoint.name}: {key} has shape {shapes[key]}, but its configuration "
                    f"requires {wanted}; they belong to different models"
                )
        names = tuple(f"{self.prefix}{name}" for name in OF_MODEL)
        extra = [key for key in shapes if key.startswith(names) and key not in expected]
        extra = [key for key in extra if not key.endswith("_extra_state")]
        if extra:
            raise CheckpointError(
                f"{self.checkpoint.name} has {len(extra)} tensors that a {self.model.architecture} "
                f"does not have (first: {extra[0]}); it cannot be exported"
            )

    def _shape(self, part: Part, layers: int) -> tuple[int, ...]:
        own: Sequence[int] = part.shape
        if part.vocabulary:
            own = (self.stored_rows, *own[1:])
        experts = [part.expert[1]] if part.expert else []
        return (*[self.model.num_layers] * layers, *experts, *own)
