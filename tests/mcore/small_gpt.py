"""A small GPTModel of random weights; imported after `nemo_kd.mcore.cpu` has patched Megatron."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig

from nemo_kd.mcore import cpu


def config_of(layers: int = 2, **changes: Any) -> TransformerConfig:
    return TransformerConfig(
        num_layers=layers,
        hidden_size=32,
        num_attention_heads=4,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        **changes,
    )


def model(config: TransformerConfig, vocabulary: int, length: int, **options: Any) -> GPTModel:
    """The same weights for the same arguments; `vocabulary` rows of the embedding."""
    torch.manual_seed(0)
    return GPTModel(
        config,
        cpu.local_layer_spec(config),
        vocab_size=vocabulary,
        max_sequence_length=length,
        position_embedding_type="rope",
        **options,
    )
