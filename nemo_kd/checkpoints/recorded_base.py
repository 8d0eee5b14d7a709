"""The base on which LoRA adapters were trained, compared with the one that they are added to.

NeMo records its path alone (`restore_from_path`), and adapters fit any base of the same shapes. So
the weights of both are compared, which may be saved in different layouts and types.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from nemo_kd.checkpoints.families import Part, parts_of
from nemo_kd.checkpoints.model import Checkpoint, CheckpointError, Model
from nemo_kd.checkpoints.source import Source, open_source
from nemo_kd.checkpoints.weights import Weights

Tensors = Callable[[Part, int | None], Sequence[torch.Tensor]]
"""Reads the tensors of Hugging Face that a Megatron tensor of a layer is made of."""


def tensors_of(weights: Weights) -> Tensors:
    return lambda part, layer: part.split(weights.read(part, layer))


def tensors_in(checkpoint: Checkpoint) -> Tensors:
    return lambda part, layer: [checkpoint.tensor(name) for name in part.shapes]


def check_base(adapters: Source, given: str | Path, model: Model, tensors: Tensors) -> str | None:
    """Refuse `given`, a base of `model` with `tensors`, if the adapters record another one.

    Return a line that names both if the recorded one cannot be compared; None if it was. Its
    tensors are read one at a time, up to the first that differs.
    Errors: CheckpointError for a recorded base that exists and has other weights.
    """
    recorded = (adapters.section or {}).get("restore_from_path")
    if recorded is None:
        return f"{adapters.path} does not record its base; {given} is taken for it"
    path = Path(str(recorded))
    if not path.exists():
        return f"{adapters.path} was trained on {path}, which is gone; {given} is taken for it"
    if path.resolve() == Path(given).resolve():
        return None
    try:
        source = open_source(path)
    except CheckpointError as error:
        return f"{adapters.path}: its base cannot be read ({error}); {given} is taken for it"
    difference = _difference(source, model, tensors)
    if difference is not None:
        raise CheckpointError(
            f"{adapters.path} was trained on {path}, but {given} is another model: {difference}; "
            f"give {path}, or a base with its weights"
        )
    return None


def _difference(source: Source, model: Model, tensors: Tensors) -> str | None:
    """Return the first difference between the weights of a source and `tensors`; None if equal."""
    if source.weights is None:
        return f"{source.path} has adapters only"
    try:
        weights = Weights(source.weights, source.prefix, model)
    except CheckpointError as error:
        return str(error)
    for part, layer in parts_of(model):
        pairs = zip(tensors_of(weights)(part, layer), tensors(part, layer), strict=True)
        for name, (ours, theirs) in zip(part.shapes, pairs, strict=True):
            if not _equal(ours, theirs, vocabulary=part.vocabulary):
                return f"{name} differs"
    return None


def _equal(ours: torch.Tensor, theirs: torch.Tensor, *, vocabulary: bool) -> bool:
    """Whether two tensors are equal, rows of padding left out, or one is the other rounded."""
    if vocabulary:
        rows = min(len(ours), len(theirs))
        ours, theirs = ours[:rows], theirs[:rows]
    if ours.shape != theirs.shape:
        return False
    return torch.equal(ours.to(theirs.dtype), theirs) or torch.equal(ours, theirs.to(ours.dtype))
