"""Write a model as Megatron-LM does, with megatron-core's own `dist_checkpointing.save`.

    python tests/mcore/megatron_lm.py DIRECTORY HF_DIRECTORY [NAME=JSON ...]

The weights are those of the Hugging Face directory; `NAME=JSON` sets an argument, null removes it.
`sharded=true` keeps the common state in a sharded object, as megatron-core 0.19, not in
`common.pt`. Beside the arguments of the model, some of a training are saved, among them objects.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_kd.mcore import cpu

cpu.install()

from megatron.core import dist_checkpointing, parallel_state, tensor_parallel  # noqa: E402
from megatron.core.dist_checkpointing import ShardedObject  # noqa: E402
from megatron.core.transformer.enums import AttnBackend  # noqa: E402

from nemo_kd.checkpoints import open_checkpoint  # noqa: E402
from nemo_kd.checkpoints.tensors import HuggingFaceTensors  # noqa: E402
from nemo_kd.mcore.gpt import build, settings_of  # noqa: E402
from nemo_kd.mcore.weights import load_weights  # noqa: E402


def arguments(config: Any, settings: Any) -> dict[str, Any]:
    """What Megatron-LM has for such a model; and some of its other arguments."""
    return {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": config.num_query_groups,
        "kv_channels": config.kv_channels,
        "max_position_embeddings": settings.max_sequence_length,
        "position_embedding_type": "rope",
        "rotary_base": int(settings.rope.base),
        "normalization": config.normalization,
        "norm_epsilon": config.layernorm_epsilon,
        "swiglu": config.gated_linear_unit,
        "add_bias_linear": False,
        "add_qkv_bias": config.add_qkv_bias,
        "qk_layernorm": config.qk_layernorm,
        "untie_embeddings_and_output_weights": not settings.tied,
        "num_experts": config.num_moe_experts,
        "moe_ffn_hidden_size": config.moe_ffn_hidden_size,
        "moe_router_topk": config.moe_router_topk,
        "moe_router_load_balancing_type": "aux_loss",
        "masked_softmax_fusion": True,
        "bias_swiglu_fusion": True,
        "attention_softmax_in_fp32": False,
        "recompute_granularity": "full",
        "lr": 1e-4,
        "attention_backend": AttnBackend.auto,
        "params_dtype": torch.bfloat16,
        "exit_signal": signal.SIGTERM,
        "tokenizer_type": "GPT2BPETokenizer",
        "padded_vocab_size": 384,
    }


def main(directory: Path, source: str, *changes: str) -> None:
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    checkpoint = open_checkpoint(source)
    settings = settings_of(checkpoint.model)
    (model,) = build(settings)
    load_weights([model], HuggingFaceTensors(checkpoint))
    given = arguments(model.config, settings)
    for change in changes:
        key, _, value = change.partition("=")
        given[key] = json.loads(value)
    sharded = given.pop("sharded", False)
    args = argparse.Namespace(**{key: one for key, one in given.items() if one is not None})
    state = dict(model.sharded_state_dict())
    common = {"args": args, "iteration": 10, "checkpoint_version": 3.0}
    if sharded:
        state["common_state"] = ShardedObject("common_state", common, (1,), (0,))
    else:
        state |= common
    state["rng_state"] = [{"np": np.random.get_state(), "torch": torch.get_rng_state()}]
    target = directory / "iter_0000010"
    target.mkdir(parents=True)
    dist_checkpointing.save(state, str(target))
    if sharded:
        (target / "common.pt").unlink()
    (directory / "latest_checkpointed_iteration.txt").write_text("10")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
