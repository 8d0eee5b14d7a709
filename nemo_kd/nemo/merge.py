"""Merge LoRA adapters into the weights of their layers, which gives a model without adapters.

    W ← W + alpha / dim · B A        A [dim, in], B [out, dim]

On the tensor-parallel layout of the run: a rank adds the part of B A that matches its part of W.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from nemo.collections.nlp.modules.common.megatron.adapters.parallel_adapters import AdapterName
from omegaconf import open_dict

from nemo_kd.errors import NemoKDError

if TYPE_CHECKING:
    from nemo_kd.nemo.model import MegatronGPTSFTKDModel

# Adapter → the linear layer of the same module whose output it is added to.
BESIDE = {
    AdapterName.LORA_KQV_ADAPTER: "linear_qkv",
    AdapterName.LORA_DENSE_ATTENTION_ADAPTER: "linear_proj",
    AdapterName.LORA_Hto4H_ADAPTER: "linear_fc1",
    AdapterName.LORA_4HtoH_ADAPTER: "linear_fc2",
}


@torch.no_grad()
def merge_lora(model: MegatronGPTSFTKDModel) -> int:
    """Merge and remove every adapter of `model`; return how many there were on this rank.

    Collectives: an all-gather of the smaller factor of each adapter over the tensor-parallel group.

    Errors: NemoKDError for adapters other than the LoRA adapters in BESIDE.
    """
    merged = 0
    for module in [module for module in model.modules() if "adapter_layer" in module._modules]:
        for name, adapter in module.adapter_layer.items():
            if name not in BESIDE:
                raise NemoKDError(
                    f"adapter {name} cannot be merged into a layer's weight; LoRA with "
                    "model.peft.lora_tuning.variant=nemo can"
                )
            weight = getattr(module, BESIDE[name]).weight
            weight.copy_(product(adapter).add_(weight))  # in float32, rounded once
            merged += 1
        del module.adapter_layer
    model.use_peft = False  # the complete model is saved now
    with open_dict(model.cfg):
        model.cfg.peft = {"peft_scheme": "none", "restore_from_path": None}
    return merged


def product(adapter: Any) -> torch.Tensor:
    """alpha / dim · B A [out, in] in float32, this rank's part, sharded like the layer."""
    a, b = adapter.linear_in.weight.float(), adapter.linear_out.weight.float()
    if adapter.input_is_parallel:  # W and A are split along `in`, B along `out`
        b = _gathered(b)
    else:  # W and B are split along `out`, A along `dim`
        a = _gathered(a)
    return adapter.alpha / adapter.dim * (b @ a)


def _gathered(part: torch.Tensor) -> torch.Tensor:
    """Gather [n, m] of each tensor-parallel rank → [n · ranks, m]."""
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(part) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts)
