"""Read a GGUF file of a Llama: its sizes, weights and tokenizer.

GGUF stores the rows of a q or k head with RoPE's pairs side by side, `(0, d/2, 1, d/2+1, …)`;
Hugging Face and Megatron keep the two halves apart. `_halves` undoes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize

from nemo_kd.checkpoints.families import check_tensors
from nemo_kd.checkpoints.gguf_header import check_header
from nemo_kd.checkpoints.model import CheckpointError, Model, finite, reading
from nemo_kd.vocabulary import VocabularySize

GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
INTEGERS = ("I8", "I16", "I32", "I64")
"""Types of GGUF that are not weights."""
RMS_EPSILON = "llama.attention.layer_norm_rms_epsilon"
READ = {
    f"llama.{name}"
    for name in (
        *("block_count", "context_length", "embedding_length", "feed_forward_length"),
        *("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),
        *("attention.key_length", "attention.value_length", "rope.dimension_count"),
        *("rope.freq_base", "rope.scaling.type", "expert_count"),
        # Of experts and scalings that the file does not have, and sizes that its tensors have.
        *("vocab_size", "expert_used_count", "rope.scaling.original_context_length"),
        "rope.scaling.finetuned",
    )
}
"""Keys that are read, or have no effect without others."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "llama.attention.causal": (True,),
    "llama.rope.scale_linear": (0, 1),
    "llama.rope.scaling.factor": (0, 1),
    "llama.rope.scaling.attn_factor": (0, 1),
    "llama.logit_scale": (0, 1),
    "llama.residual_scale": (0, 1),
    "llama.embedding_scale": (0, 1),
    "llama.tensor_data_layout": ("Meta AI original pth",),  # the one described above
}
"""Further keys, and their values that are a Llama's; of keys that are not known those are 0."""
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFCheckpoint:
    """A memory-mapped GGUF file, whose tensors are dequantised to float32 on access."""

    dtype = torch.float32
    generation_config = None

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.name = str(self.path)
        with reading(self.name, "not a readable GGUF file"):
            check_header(self.path)
            self._reader = GGUFReader(self.path)
            self._tensors = {_hf_name(tensor.name): tensor for tensor in self._reader.tensors}
            self.model = self._read_model()
        for name, tensor in self._tensors.items():
            if tensor.tensor_type.name in INTEGERS:
                raise CheckpointError(
                    f"{self.name}: {name} is {tensor.tensor_type.name}; weights must be floats, or "
                    "quantised floats"
                )
        # GGUF gives shapes innermost first.
        shapes = {
            name: tuple(int(n) for n in reversed(tensor.shape))
            for name, tensor in self._tensors.items()
        }
        check_tensors(self.name, self.model, shapes)

    @property
    def config(self) -> dict[str, Any]:
        """The model's `config.json`, as transformers would write it."""
        model = self.model
        return {
            "architectures": [model.architecture],
            "model_type": "llama",
            "num_hidden_layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "intermediate_size": model.ffn_hidden_size,
            "num_attention_heads": model.num_heads,
            "num_key_value_heads": model.num_kv_heads,
            "head_dim": model.head_dim,
            "vocab_size": model.vocab_size,
            "max_position_embeddings": model.context,
            "rms_norm_eps": model.norm_eps,
            "rope_theta": model.rope.base,
            "tie_word_embeddings": model.tied,
            "hidden_act": "silu",
        }

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of a Hugging Face name, float32 `[out, in]`."""
        stored = self._tensors[name]
        with reading(f"{self.name}: {name}"):
            # A float32 tensor comes back as the read-only file itself; torch wants its own memory.
            array = np.require(dequantize(stored.data, stored.tensor_type), np.float32, ["C", "W"])
        values = finite(self.name, name, torch.from_numpy(array))
        if name.endswith("q_proj.weight"):
            return _halves(values, self.model.num_heads)
        if name.endswith("k_proj.weight"):
            return _halves(values, self.model.num_kv_heads)
        return values

    def dtype_of(self, name: str) -> torch.dtype:
        return self.dtype

    def save_tokenizer(self, directory: str) -> VocabularySize:
        """Write the file's tokenizer for transformers; return its vocabulary's size."""
        from nemo_kd.checkpoints.gguf_tokenizer import build_tokenizer

        with reading(self.name, "its tokenizer is damaged"):
            tokenizer = build_tokenizer(self.name, self.field)
            tokenizer.save_pretrained(directory)
            return VocabularySize.of(tokenizer)

    def field(self, key: str, default: Any = None) -> Any:
        """A metadata value of the file, or `default`."""
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def _required(self, key: str) -> Any:
        value = self.field(key)
        if value is None:
            raise CheckpointError(f"{self.name} lacks {key}; it is not a complete GGUF of a Llama")
        return value

    def _read_model(self) -> Model:
        architecture = self.field("general.architecture")
        if architecture != "llama":
            raise CheckpointError(
                f"{self.name}: general.architecture is {architecture!r}; only 'llama' is converted"
            )
        if self.field("llama.expert_count", 0):
            raise CheckpointError(
                f"{self.name} is a mixture of experts; only dense Llamas are supported"
            )
        scaled = self.field("llama.rope.scaling.type", "none") != "none"
        if scaled or "rope_freqs.weight" in self._tensors:
            raise CheckpointError(
                f"{self.name} has RoPE scaling factors, which NeMo cannot represent; "
                "convert the model's Hugging Face directory instead"
            )
        self._refuse_unread()
        heads = self._required("llama.attention.head_count")
        hidden = self._required("llama.embedding_length")
        return Model.of(
            self.name,
            architecture="LlamaForCausalLM",
            num_layers=self._required("llama.block_count"),
            hidden_size=hidden,
            ffn_hidden_size=self._required("llama.feed_forward_length"),
            num_heads=heads,
            num_kv_heads=self.field("llama.attention.head_count_kv", heads),
            head_dim=self._head_dim(hidden // heads),
            vocab_size=len(self._required("tokenizer.ggml.tokens")),
            context=self._required("llama.context_length"),
            # Stored in float32: 9.9999997e-06 is 1e-05.
            norm_eps=float(f"{self._required(RMS_EPSILON):.6g}"),
            rope={"base": self.field("llama.rope.freq_base", 10000.0)},
            tied="lm_head.weight" not in self._tensors,
        )

    def _refuse_unread(self) -> None:
        """Raise CheckpointError for settings that are not those of a Llama."""
        keys = [key for key in self._reader.fields if key.startswith("llama.") and key not in READ]
        unread = [
            f"{key}={self.field(key)!r}"
            for key in keys
            if self.field(key) not in NEUTRAL.get(key, (0, "", []))
        ]
        if unread:
            raise CheckpointError(
                f"{self.name} has {', '.join(unread)}, which the conversion of a Llama does not "
                "read; convert the model's Hugging Face directory instead"
            )

    def _head_dim(self, default: int) -> int:
        """Return the size of a head; raise CheckpointError if it is rotated in part only."""
        keys = ("rope.dimension_count", "attention.key_length", "attention.value_length")
        given = {key: self.field(f"llama.{key}") for key in keys}
        found = {key: size for key, size in given.items() if size is not None}
        if len(set(found.values())) > 1:
            sizes = ", ".join(f"llama.{key}={size}" for key, size in found.items())
            raise CheckpointError(
                f"{self.name} has {sizes}: heads that are not rotated whole, or values of another "
                "size than keys, are not converted"
            )
        return next(iter(found.values()), default)


def _hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`; others are unchanged."""
    if name in GLOBAL_NAMES:
        return GLOBAL_NAMES[name]
    prefix, _, rest = name.partition(".")
    layer, _, rest = rest.partition(".")
    stem, _, kind = rest.rpartition(".")
    if prefix != "blk" or stem not in LAYER_NAMES:
        return name
    return f"model.layers.{layer}.{LAYER_NAMES[stem]}.{kind}"


def _halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows `[heads, head_dim/2, 2]` → `[heads, 2, head_dim/2]`."""
    out, hidden = weight.shape
    pairs = weight.view(heads, out // heads // 2, 2, hidden)
    return pairs.transpose(1, 2).reshape(out, hidden)
