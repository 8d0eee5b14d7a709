"""Load a checkpoint's weights into GPTModels, on any layout of tensor, pipeline and expert ranks.

Each rank reads the tensors of its own layers, one at a time, and keeps its part of each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state

from nemo_kd.checkpoints.model import CheckpointError
from nemo_kd.checkpoints.source import EMBEDDING, LM_HEAD
from nemo_kd.checkpoints.tensors import LAYERS, MegatronTensors
from nemo_kd.mcore.lm_head import gpt_module

LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")
GROUPED = re.compile(r"mlp\.experts\.(linear_fc[12])\.(weight|bias)(\d+)")
FUSED_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""Megatron-core's norms before attention and MLP, and their names in TransformerEngine's layers."""


@dataclass(frozen=True)
class _Place:
    """Where a parameter's values are in a checkpoint."""

    names: tuple[str, ...]
    """Names to look under, in this order."""
    layer: int | None = None
    expert: int | None = None


@torch.no_grad()
def load_weights(chunks: Sequence[Any], source: MegatronTensors) -> None:
    """Set all parameters of this rank's model chunks to the checkpoint's values.

    `chunks` are the GPTModels of `gpt.build`, in wrappers or not. Rows of the embedding beyond the
    checkpoint's are zero. Collectives: an all-gather of names over the pipeline.

    Errors: CheckpointError if the model has a tensor that the checkpoint lacks, or one of another
    shape, and if the checkpoint has one that the model lacks.
    """
    models = [gpt_module(chunk) for chunk in chunks]
    total = models[0].config.num_layers
    if total != source.num_layers:
        raise CheckpointError(
            f"{source.name} has {source.num_layers} layers, but its configuration {total}; they "
            "belong to different models"
        )
    used = set()
    available = source.names
    for model in models:
        for name, parameter in model.named_parameters():
            place = _place(model, name)
            found = next((one for one in place.names if one in available), None)
            if found is None:
                raise CheckpointError(
                    f"{source.name} lacks {place.names[0]}, which a model of its configuration "
                    "has; is it another model?"
                )
            used.add(found)
            whole = source.read(found, place.layer, place.expert)
            _copy(source.name, found, whole, parameter, model.config)
    _refuse_unused(source, used)


def _place(model: Any, name: str) -> _Place:
    """Return where the values of the parameter `name` are in a checkpoint."""
    match = LAYER.fullmatch(name)
    if match is None:
        # With tied weights, the last stage has its own copy of the embedding.
        tied = model.share_embeddings_and_output_weights and name == LM_HEAD
        return _Place((EMBEDDING,) if tied else (name,))
    number = model.decoder.layers[int(match[1])].layer_number - 1
    rest, first = match[2], _first_expert(model.config)
    if one := EXPERT.fullmatch(rest):
        return _Place((f"{LAYERS}mlp.experts.experts.{one[2]}",), number, first + int(one[1]))
    if one := GROUPED.fullmatch(rest):
        stored = f"{LAYERS}mlp.experts.experts.{one[1]}.{one[2]}"
        return _Place((stored,), number, first + int(one[3]))
    fused = [rest.replace(own, te, 1) for own, te in FUSED_NORMS.items() if rest.startswith(own)]
    return _Place(tuple(f"{LAYERS}{one}" for one in (rest, *fused)), number)


def _first_expert(config: Any) -> int:
    """Return the number of this rank's first expert."""
    ranks = config.expert_model_parallel_size
    if config.num_moe_experts is None or ranks == 1:
        return 0
    rank: int = parallel_state.get_expert_model_parallel_rank()
    return rank * config.num_moe_experts // ranks


def _copy(
    checkpoint: str, name: str, whole: torch.Tensor, parameter: torch.Tensor, config: Any
) -> None:
    """Copy this rank's part of the tensor `whole`."""
    part = whole
    if getattr(parameter, "tensor_model_parallel", False):
        axis = parameter.partition_dim  # type: ignore[attr-defined]
        size, rank = _tensor_ranks(name)
        if name in (EMBEDDING, LM_HEAD):
            part = _padded(whole, parameter.shape[0] * size)
        gated = config.gated_linear_unit and "linear_fc1." in name and "layer_norm" not in name
        halves = part.chunk(2, axis) if gated else [part]
        if all(half.shape[axis] % size == 0 for half in halves):
            part = torch.cat([half.chunk(size, axis)[rank] for half in halves], axis)
    if part.shape != parameter.shape:
        raise CheckpointError(
            f"{checkpoint}: {name} has shape {tuple(whole.shape)}, of which this rank would have "
            f"{tuple(part.shape)}, but its configuration requires {tuple(parameter.shape)}; they "
            "belong to different models"
        )
    parameter.copy_(part)


def _tensor_ranks(name: str) -> tuple[int, int]:
    """Return how many ranks share a tensor, and which of them this one is."""
    if ".experts." in name:
        return (
            parallel_state.get_expert_tensor_parallel_world_size(),
            parallel_state.get_expert_tensor_parallel_rank(),
        )
    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )


def _padded(table: torch.Tensor, rows: int) -> torch.Tensor:
    """Return the table [V, H] with `rows` rows: cut, or filled with zeros."""
    missing = rows - table.shape[0]
    return table[:rows] if missing <= 0 else torch.nn.functional.pad(table, (0, 0, 0, missing))


def _refuse_unused(source: MegatronTensors, used: set[str]) -> None:
    """Raise CheckpointError if no stage of the model has used a tensor of the checkpoint."""
    left = sorted(source.names - set(_over_pipeline(used)))
    left = [name for name in left if not name.endswith("_extra_state")]
    if left:
        raise CheckpointError(
            f"{source.name} has {len(left)} tensors that a model of its configuration does not "
            f"have (first: {left[0]}); they belong to different models"
        )


def _over_pipeline(used: set[str]) -> Iterator[str]:
    size = parallel_state.get_pipeline_model_parallel_world_size()
    parts: list[Any] = [used] * size
    if size > 1:
        group = parallel_state.get_pipeline_model_parallel_group()
        torch.distributed.all_gather_object(parts, used, group=group)
    for part in parts:
        yield from part
