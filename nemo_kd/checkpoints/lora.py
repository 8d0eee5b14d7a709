"""LoRA adapters of NeMo: merged into their model, or as a directory of the PEFT library.

    W ← W + alpha / dim · B A        A [dim, in], B [out, dim]

NeMo adapts Megatron's fused tensors. PEFT adapts the tensors that these are made of: they share A,
and B is split like the weight.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_kd.checkpoints import nemo_settings
from nemo_kd.checkpoints.distributed import files_of
from nemo_kd.checkpoints.families import Part, family_of, parts_of
from nemo_kd.checkpoints.model import CheckpointError, Model, finite, reading
from nemo_kd.checkpoints.source import PICKLED_WEIGHTS, Source, open_source
from nemo_kd.checkpoints.weights import Weights

ATTENTION = "self_attention.adapter_layer"
ADAPTED = {
    f"{ATTENTION}.lora_kqv_adapter": "self_attention.linear_qkv.weight",
    f"{ATTENTION}.lora_dense_attention_adapter": "self_attention.linear_proj.weight",
    "mlp.adapter_layer.lora_hto4h_adapter": "mlp.linear_fc1.weight",
    "mlp.adapter_layer.lora_4htoh_adapter": "mlp.linear_fc2.weight",
}
"""NeMo's adapters, and the weight of the same layer to whose output each adds."""
ROW_PARALLEL = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")
"""Weights that tensor parallelism divides along `in`."""
GATED = "mlp.linear_fc1.weight"
KEY = re.compile(
    r"model\.(?:module\.)?decoder\.layers\.(\d+)\.(.+)\.(linear_in|linear_out)\.weight"
)
Pairs = Mapping[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]
"""(layer, Megatron's weight) → A [dim, in], B [out, dim]."""
RANKS = "mp_rank_{:02d}", "tp_rank_{:02d}_pp_rank_{:03d}"


@dataclass(frozen=True)
class Adapters:
    """LoRA adapters of one training, from all of its ranks."""

    source: Source
    dim: int
    alpha: float
    pairs: Pairs

    @property
    def scale(self) -> float:
        return self.alpha / self.dim


def open_adapters(path: str | Path, model: Model) -> Adapters:
    """Open the `.nemo` of a LoRA training, saved at any tensor and pipeline parallel size.

    Errors: CheckpointError for other schemes, variants that PEFT does not have, and adapters
    that do not fit `model`.
    """
    source = open_source(path)
    if source.weights is not None or source.section is None:
        raise CheckpointError(f"{path} is a complete model, not adapters; export it without a base")
    settings = _settings(source)
    nemo_settings.check(str(source.path), source.section, model)
    ranks, gated = _ranks(source), family_of(model).gated
    pairs: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]] = {}
    first = 0
    for stage in ranks:
        found = [_factors(source, state) for state in stage]
        for layer, weight in found[0]:
            pairs[first + layer, weight] = _gathered(
                [one[layer, weight] for one in found], weight, gated
            )
        first += _layers(source, len(ranks))
    if not pairs:
        raise CheckpointError(f"{path} has no adapters")
    dim = next(iter(pairs.values()))[0].shape[0]
    alpha = settings.get("alpha")
    _check(source, pairs, model)
    return Adapters(source, dim, float(dim if alpha is None else alpha), pairs)


def _settings(source: Source) -> Mapping[str, Any]:
    """model.peft.lora_tuning; raise CheckpointError if it is not plain LoRA."""
    peft = (source.section or {}).get("peft") or {}
    scheme = peft.get("peft_scheme")
    if scheme != "lora":
        raise CheckpointError(
            f"{source.path}: model.peft.peft_scheme is {scheme}; only lora can be exported"
        )
    settings: Mapping[str, Any] = peft.get("lora_tuning") or {}
    for key, plain in (("variant", "nemo"), ("weight_tying", False)):
        if settings.get(key, plain) != plain:
            raise CheckpointError(
                f"{source.path}: model.peft.lora_tuning.{key} is {settings[key]}; only {plain} can "
                "be exported"
            )
    return settings


def _layers(source: Source, stages: int) -> int:
    """Layers of a pipeline stage."""
    count = int((source.section or {}).get("num_layers") or 0)
    if count % stages:
        raise CheckpointError(f"{source.path}: {count} layers on {stages} stages are not even")
    return count // stages


def _ranks(source: Source) -> list[list[Mapping[str, torch.Tensor]]]:
    """State of each rank: pipeline stage → tensor-parallel rank."""
    section = source.section or {}
    tensor = int(section.get("tensor_model_parallel_size") or 1)
    stages = int(section.get("pipeline_model_parallel_size") or 1)
    if section.get("virtual_pipeline_model_parallel_size"):
        raise CheckpointError(f"{source.path}: adapters of virtual pipeline stages are not read")
    if tensor * stages == 1:
        return [[_state(source, "")]]
    if stages == 1:
        return [[_state(source, RANKS[0].format(rank)) for rank in range(tensor)]]
    return [
        [_state(source, RANKS[1].format(rank, stage)) for rank in range(tensor)]
        for stage in range(stages)
    ]


def _state(source: Source, folder: str) -> Mapping[str, torch.Tensor]:
    files = files_of(source.path, folder)
    if PICKLED_WEIGHTS not in files:
        raise CheckpointError(
            f"{source.path} lacks {folder}/{PICKLED_WEIGHTS}".replace(" /", " ")
            + "; it is not complete, or not the .nemo of adapters"
        )
    with reading(f"{source.path}: {PICKLED_WEIGHTS}"), files[PICKLED_WEIGHTS].open() as file:
        found = torch.load(file, map_location="cpu", weights_only=True)
        return {str(key): finite(str(source.path), key, value) for key, value in found.items()}


def _factors(
    source: Source, state: Mapping[str, torch.Tensor]
) -> dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]:
    """(layer of the stage, weight) → this rank's A and B."""
    parts: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        match = KEY.fullmatch(key)
        if match is None or match[2] not in ADAPTED:
            raise CheckpointError(f"{source.path}: {key} is not of a LoRA adapter that is exported")
        parts.setdefault((int(match[1]), ADAPTED[match[2]]), {})[match[3]] = tensor
    return {at: (both["linear_in"], both["linear_out"]) for at, both in parts.items()}


def _gathered(
    ranks: list[tuple[torch.Tensor, torch.Tensor]], weight: str, gated: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of all tensor-parallel ranks, which divide A like the layer's input or along dim."""
    a, b = ([rank[i] for rank in ranks] for i in (0, 1))
    if weight == GATED and gated:  # of each rank: its gate above its up
        b = [half for i in (0, 1) for half in (one.chunk(2)[i] for one in b)]
    return torch.cat(a, dim=1 if weight in ROW_PARALLEL else 0), torch.cat(b)


def _check(source: Source, pairs: Pairs, model: Model) -> None:
    """Raise CheckpointError unless all adapters fit weights of the model."""
    fitting = {
        (layer, part.megatron): part.shape
        for part, layer in parts_of(model)
        if layer is not None and part.expert is None
    }
    for (layer, weight), (a, b) in pairs.items():
        shape = fitting.get((layer, weight))
        if shape != (b.shape[0], a.shape[1]) or a.shape[0] != b.shape[1]:
            raise CheckpointError(
                f"{source.path}: the adapter of {weight} in layer {layer} is for a weight of shape "
                f"{(b.shape[0], a.shape[1])}, but the base has {shape}; give the base of its "
                "training"
            )


class MergedWeights(Weights):
    """Weights of a model with adapters added, those in float32: who writes them rounds once."""

    def __init__(self, base: Weights, adapters: Adapters) -> None:
        super().__init__(base.checkpoint, base.prefix, base.model)
        self.adapters = adapters

    def read(self, part: Part, layer: int | None) -> torch.Tensor:
        weight = super().read(part, layer)
        pair = None if layer is None else self.adapters.pairs.get((layer, part.megatron))
        if pair is None:
            return weight
        a, b = (factor.float() for factor in pair)
        return (self.adapters.scale * (b @ a)).add_(weight)


def split(adapters: Adapters, model: Model) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield PEFT's tensors: (name, tensor) of A and B of each of Hugging Face's weights."""
    for part, layer in parts_of(model):
        pair = None if layer is None else adapters.pairs.get((layer, part.megatron))
        if pair is None:
            continue
        for name, b in zip(part.shapes, part.split(pair[1]), strict=True):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            yield f"{module}.lora_A.weight", pair[0]
            yield f"{module}.lora_B.weight", b
