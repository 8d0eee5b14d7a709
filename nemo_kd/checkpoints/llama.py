"""A Llama-family checkpoint: its sizes, and the name and shape of every tensor.

    layer(x) = h + W_down(silu(W_gate n) * W_up n)
    n = rmsnorm(h),  h = x + attention(rmsnorm(x))

Readers (`huggingface.py`, `gguf_file.py`) provide a `Llama` and tensors under Hugging Face's names
to the writer (`megatron.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from nemo_kd.errors import NemoKDError


class CheckpointError(NemoKDError):
    """A checkpoint that cannot be read, or cannot be converted without changing the model."""


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's scaling: wavelengths beyond the original context are stretched by `factor`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True)
class Llama:
    """Sizes and constants of a model."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    """Query groups; equal to `num_heads` without grouped-query attention."""
    head_dim: int
    vocab_size: int
    """Rows of the embedding, which may exceed the tokenizer's vocabulary."""
    context: int
    norm_eps: float
    rope_base: float
    rope_scaling: RopeScaling | None
    tied: bool
    """Whether the LM head shares the embedding's weight."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"{self.num_heads} attention heads cannot share {self.num_kv_heads} key/value heads"
                " evenly; grouped-query attention needs a divisor"
            )

    def layer_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Tensors of one layer under Hugging Face's names; weights are `[out, in]`."""
        hidden, ffn = self.hidden_size, self.ffn_hidden_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }
        return {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model, name → shape."""
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, self.hidden_size),
            "model.norm.weight": (self.hidden_size,),
        }
        for layer in range(self.num_layers):
            shapes |= self.layer_shapes(layer)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes


class Checkpoint(Protocol):
    """An open checkpoint, whose tensors are read on access."""

    llama: Llama
    dtype: torch.dtype
    """The weights' type; float32 for quantised weights."""
    name: str

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of a Hugging Face name, in `dtype`."""

    def save_tokenizer(self, directory: str) -> int:
        """Write a tokenizer that transformers loads to `directory`; return its vocabulary size."""


# A buffer that older versions of transformers saved; it follows from the configuration.
IGNORED = ("rotary_emb.inv_freq",)


def check_tensors(name: str, llama: Llama, found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless the tensors `found` are exactly those of `llama`."""
    expected = llama.shapes()
    missing = [key for key in expected if key not in found]
    if missing:
        raise CheckpointError(
            f"{name} lacks {len(missing)} of {len(expected)} tensors that its configuration "
            f"({llama.num_layers} layers) requires (first: {missing[0]}); is a shard missing?"
        )
    for key, shape in expected.items():
        if tuple(found[key]) != shape:
            raise CheckpointError(
                f"{name}: {key} has shape {tuple(found[key])}, but "
                f"the configuration requires {shape}; they belong to different models"
            )
    ignored = (*IGNORED, "lm_head.weight") if llama.tied else IGNORED
    extra = [key for key in found if key not in expected and not key.endswith(ignored)]
    if extra:
        raise CheckpointError(
            f"{name} has {len(extra)} tensors that a Llama without biases does not have (first: "
            f"{extra[0]}); only plain Llama models can be converted"
        )
