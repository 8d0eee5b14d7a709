"""A single process of Megatron-core, and a Llama with random weights in it."""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from benchmarks.gpu.sizes import Sizes
from nemo_kd.mcore import cpu


def start(device: str, **rng: bool) -> None:
    """Create the groups of one process; on a CPU, patch Megatron for it. Repeating is harmless.

    Call it before any import of Megatron. `rng`: arguments of `model_parallel_cuda_manual_seed`.
    """
    cpu.install()
    from megatron.core import parallel_state, tensor_parallel

    if not torch.distributed.is_initialized():
        store = torch.distributed.FileStore(tempfile.mkstemp()[1], 1)
        backend = "gloo" if device == "cpu" else "nccl"
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1234, **rng)


def llama(sizes: Sizes, **changes: Any) -> Any:
    """Build a GPTModel in bf16 by `nemo_kd.mcore.gpt`; `changes` are of its TransformerConfig."""
    from nemo_kd.checkpoints.model import Rope
    from nemo_kd.mcore.gpt import GPTSettings, build

    model = sizes.model
    settings = GPTSettings(
        config={
            "num_layers": model["num_hidden_layers"],
            "hidden_size": model["hidden_size"],
            "ffn_hidden_size": model["intermediate_size"],
            "num_attention_heads": model["num_attention_heads"],
            "num_query_groups": model["num_key_value_heads"],
            "kv_channels": model["head_dim"],
            "normalization": "RMSNorm",
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "add_bias_linear": False,
        },
        vocab_size=model["vocab_size"],
        max_sequence_length=sizes.tokens,
        rope=Rope(base=500_000.0),
        tied=True,
    )
    dtype = {"bf16": True, "params_dtype": torch.bfloat16, **changes}
    return build(settings, **dtype)[0]
