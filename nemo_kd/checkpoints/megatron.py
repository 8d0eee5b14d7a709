"""A model's weights as a Megatron distributed checkpoint, which loads at any TP x PP.

The names are those of TransformerEngine's layers, under which megatron-core's local layers
(CPU, no TransformerEngine) save and load as well. Layers are slices of one tensor `[L, …]`, experts
of one tensor `[L, E, …]`; `families.py` has names and shapes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nemo_kd.checkpoints.families import Part, family_of, global_parts, layer_parts, shapes_of
from nemo_kd.checkpoints.model import Checkpoint, CheckpointError, Model

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


def sharded_state(
    checkpoint: Checkpoint,
    keep_layers: Sequence[int],
    dtype: torch.dtype,
    layer_read: Callable[[], None],
) -> dict[str, Any]:
    """Sharded state of the kept layers.

    Embedding and LM head keep their rows beyond the tokenizer's vocabulary; on loading, Megatron
    takes as many as its padded vocabulary has.
    `layer_read` is called after each layer.
    """
    from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor

    state: dict[str, Any] = {}
    count = len(keep_layers)
    for part in global_parts(checkpoint.model):
        weight, key = _read(checkpoint, part), f"model.{part.megatron}"
        state[key] = ShardedTensor.from_rank_offsets(key, weight.to(dtype).contiguous())
    final = "model.decoder.final_layernorm._extra_state"
    state[final] = ShardedObject(final, None, (1,), (0,))
    for position, layer in enumerate(keep_layers):
        for part in layer_parts(checkpoint.model, layer):
            weight, key = _read(checkpoint, part), f"{LAYERS}.{part.megatron}"
            at = [(0, position, count), *([(1, *part.expert)] if part.expert else [])]
            name = ".".join(map(str, [key, position, *(part.expert or [])[:1]]))
            state[name] = ShardedTensor.from_rank_offsets(
                key, weight.to(dtype).contiguous(), *at, prepend_axis_num=len(at)
            )
        for name, places in _extra_states(checkpoint.model):
            key = f"{LAYERS}.{name}._extra_state"
            shape = (count, len(places)) if places[0] else (count,)
            for place in places:
                at_place = (position, *place)
                state[f"{key}.{at_place}"] = ShardedObject(key, None, shape, at_place)
        layer_read()
    return state


def _read(checkpoint: Checkpoint, part: Part) -> torch.Tensor:
    return part.join([checkpoint.tensor(name) for name in part.shapes])


def _extra_states(model: Model) -> Iterator[tuple[str, list[tuple[int, ...]]]]:
    """Yield each name within a layer, and its places within the layer: none, or the experts."""
    for name in (*EXTRA_STATES, *(QK_EXTRA_STATES if family_of(model).qk_norm else ())):
        yield name, [()]
    if model.experts is None:
        for name in MLP_EXTRA_STATES:
            yield name, [()]
        return
    yield "pre_mlp_layernorm", [()]
    for name in ("mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2"):
        yield name, [(number,) for number in range(model.experts.number)]


def save(state: dict[str, Any], directory: Path) -> None:
    """Write `state` to `directory` from a single process, in a process group of one."""
    from megatron.core import dist_checkpointing

    directory.mkdir(parents=True)
    with _process_group_of_one():
        dist_checkpointing.save(state, str(directory))


@contextlib.contextmanager
def _process_group_of_one() -> Iterator[None]:
    if torch.distributed.is_initialized():
        if torch.distributed.get_world_size() > 1:
            raise CheckpointError(
                f"a conversion runs in one process, not in {torch.distributed.get_world_size()}: "
                "start it with python instead of torchrun"
            )
        yield
        return
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def count_parameters(model: Model, vocab_size: int) -> int:
    """Number of weights in the converted model, whose embedding has `vocab_size` rows."""
    shapes = shapes_of(replace(model, vocab_size=vocab_size))
    return sum(torch.Size(shape).numel() for shape in shapes.values())
