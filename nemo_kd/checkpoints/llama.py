"""A Llama-family checkpoint: its sizes, and the name and shape of every tensor.

    layer(x) = h + W_down(silu(W_gate n) * W_up n)
    n = rmsnorm(h),  h = x + attention(rmsnorm(x))

Readers (`huggingface.py`, `gguf_file.py`) provide a `Llama` and tensors under Hugging Face's names
to the writer (`megatron.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, TypeVar

import msgspec
import torch

from nemo_kd.errors import NemoKDError
from nemo_kd.vocabulary import VocabularySize

Value = TypeVar("Value")


class CheckpointError(NemoKDError):
    """A checkpoint that cannot be read, or cannot be converted without changing the model."""


@contextmanager
def reading(name: str, what: str = "it is damaged or not complete") -> Iterator[None]:
    """Context manager that raises CheckpointError in one line for a damaged file.

    A checkpoint may come from anyone, and the libraries that read one raise errors of any type.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:MAX_REASON]
        raise CheckpointError(f"{name}: {what} ({reason})") from error


def checked(name: str, values: Mapping[str, Any], kind: type[Value]) -> Value:
    """Return values of the file `name` as `kind`; raise CheckpointError for a wrong one."""
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{name}: {error}") from error


MAX_REASON = 300  # characters
Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
Layers = Annotated[int, msgspec.Meta(ge=1, le=1 << 12)]
Positive = Annotated[float, msgspec.Meta(gt=0, lt=1e30)]


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's scaling: wavelengths beyond the original context are stretched by `factor`."""

    factor: Positive
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_context: Size


@dataclass(frozen=True)
class Llama:
    """Sizes and constants of a model."""

    num_layers: Layers
    hidden_size: Size
    ffn_hidden_size: Size
    num_heads: Size
    num_kv_heads: Size
    """Query groups; equal to `num_heads` without grouped-query attention."""
    head_dim: Size
    vocab_size: Size
    """Rows of the embedding, which may exceed the tokenizer's vocabulary."""
    context: Size
    norm_eps: Positive
    rope_base: Positive
    rope_scaling: RopeScaling | None
    tied: bool
    """Whether the LM head shares the embedding's weight."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"{self.num_heads} attention heads cannot share {self.num_kv_heads} key/value heads"
                " evenly; grouped-query attention needs a divisor"
            )

    @classmethod
    def of(cls, name: str, **values: Any) -> Llama:
        """Build a model from values of the file `name`; raise CheckpointError for a wrong one."""
        return checked(name, values, cls)

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

    def save_tokenizer(self, directory: str) -> VocabularySize:
        """Write a tokenizer that transformers loads to `directory`; return its vocabulary size."""


# A buffer that older versions of transformers saved; it follows from the configuration.
IGNORED = ("rotary_emb.inv_freq",)


def finite(name: str, key: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor; raise CheckpointError if a value is NaN or infinite."""
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{name}: {key} has values that are NaN or infinite")
    return tensor


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
