"""A model's weights as a Megatron distributed checkpoint, which loads at any TP x PP.

The names are those of TransformerEngine's layers, under which megatron-core's local layers
(CPU, no TransformerEngine) save and load as well. Layers are slices of one tensor `[L, …]`, experts
of one tensor `[L, E, …]`; `families.py` has names and shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import reduce

import torch

from nemo_kd.checkpoints.distributed import Place, Slice
from nemo_kd.checkpoints.families import Part, family_of, global_parts, layer_parts, shapes_of
from nemo_kd.checkpoints.model import Checkpoint, Model

LAYERS = "model.decoder.layers"
# TransformerEngine's layers keep FP8 scales under these names, empty without FP8, and megatron-core
# requires all of them on loading. Its local layers have only the linear ones, so a .nemo that
# NeMo saves on a CPU lacks the others.
EXTRA_STATES = (
    "self_attention.core_attention",
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
)
MLP_EXTRA_STATES = ("mlp.linear_fc1", "mlp.linear_fc2")
QK_EXTRA_STATES = ("self_attention.q_layernorm", "self_attention.k_layernorm")


def slices(
    checkpoint: Checkpoint, keep_layers: Sequence[int], dtype: torch.dtype | None
) -> Iterator[Slice]:
    """Yield the tensors outside the layers and of the kept layers, in `dtype`.

    `dtype` None keeps each tensor's own, the widest of those that are joined.

    Embedding and LM head keep their rows beyond the tokenizer's vocabulary; on loading, Megatron
    takes as many as its padded vocabulary has.
    """
    for part in global_parts(checkpoint.model):
        yield _slice(checkpoint, part, f"model.{part.megatron}", dtype)
    for position, layer in enumerate(keep_layers):
        place = (position, len(keep_layers))
        for part in layer_parts(checkpoint.model, layer):
            at = (place,) if part.expert is None else (place, part.expert)
            yield _slice(checkpoint, part, f"{LAYERS}.{part.megatron}", dtype, at)


def _slice(
    checkpoint: Checkpoint, part: Part, key: str, dtype: torch.dtype | None, at: Place = ()
) -> Slice:
    own = reduce(torch.promote_types, map(checkpoint.dtype_of, part.shapes))

    def read() -> torch.Tensor:
        return part.join([checkpoint.tensor(name) for name in part.shapes])

    return Slice(key, part.shape, dtype or own, read, at)


def extra_states(model: Model, num_layers: int) -> Iterator[tuple[str, Place]]:
    """Yield (key, place) of each state of TransformerEngine, of which all are empty."""
    yield "model.decoder.final_layernorm._extra_state", ()
    for position in range(num_layers):
        for name, places in _extra_states(model):
            for place in places:
                yield f"{LAYERS}.{name}._extra_state", ((position, num_layers), *place)


def _extra_states(model: Model) -> Iterator[tuple[str, list[Place]]]:
    """Yield each name within a layer, and its places within the layer: one, or the experts."""
    for name in (*EXTRA_STATES, *(QK_EXTRA_STATES if family_of(model).qk_norm else ())):
        yield name, [()]
    if model.experts is None:
        for name in MLP_EXTRA_STATES:
            yield name, [()]
        return
    number = model.experts.number
    yield "pre_mlp_layernorm", [()]
    for name in ("mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2"):
        yield name, [((expert, number),) for expert in range(number)]


def count_parameters(model: Model, vocab_size: int) -> int:
    """Number of weights in the converted model, whose embedding has `vocab_size` rows."""
    shapes = shapes_of(replace(model, vocab_size=vocab_size))
    return sum(torch.Size(shape).numel() for shape in shapes.values())
