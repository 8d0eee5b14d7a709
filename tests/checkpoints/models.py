"""Tiny models of transformers with random weights, saved as its users save them, and as GGUF."""

from __future__ import annotations

import io
import json
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

TEXT = textwrap.__doc__ + Path(textwrap.__file__).read_text()
TOKENS = 299
# One row of the embedding more than there are tokens, and no multiple of any padding.
SHARED = {"vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4}
MODELS: dict[str, dict[str, Any]] = {
    "tied_grouped": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-3,
        "max_position_embeddings": 128,
    },
    "untied_llama3": {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "tie_word_embeddings": False,
        "rope_theta": 5e5,
        "max_position_embeddings": 128,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
}

SMALL_EXPERTS = {"num_experts_per_tok": 2, "num_hidden_layers": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {
        "model_type": "mistral",
        "head_dim": 16,
        "sliding_window": None,
        "vocab_size": 1000,  # more than Megatron's padding adds to the tokens
    },
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "phi3": {"model_type": "phi3", "pad_token_id": 1, "sliding_window": None},
    "phi3_partial": {"model_type": "phi3", "pad_token_id": 1, "partial_rotary_factor": 0.5},
    "phi3_longrope": {
        "model_type": "phi3",
        "pad_token_id": 1,
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 160,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
            "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 9.0],
        },
    },
    "nemotron": {"model_type": "nemotron", "hidden_act": "relu2", "norm_eps": 1e-5},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, **SMALL_EXPERTS},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 4,
        "moe_intermediate_size": 40,
        "norm_topk_prob": True,
        **SMALL_EXPERTS,
    },
    "qwen3_moe_unnormalized": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 4,
        "moe_intermediate_size": 40,
        "norm_topk_prob": False,
        **SMALL_EXPERTS,
    },
}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "yarn": {
        "max_position_embeddings": 512,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    },
    "longrope": {
        "max_position_embeddings": 256,
        "rope_scaling": {
            "rope_type": "longrope",
            "factor": 4.0,
            "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
            "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 9.0],
        },
    },
}


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of `TOKENS` tokens; begin, end and padding have ids 0, 1, 1."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def llama(name: str) -> LlamaForCausalLM:
    """Random weights, norms included, large enough that a swapped tensor shows in the logits."""
    model: LlamaForCausalLM = build("llama", **MODELS[name])
    return model


def family(name: str) -> PreTrainedModel:
    """A model of `FAMILIES`, or of a rope of `ROPES`."""
    settings = FAMILIES[name] if name in FAMILIES else {**ROPES[name], "model_type": "llama"}
    settings = {**MODELS["tied_grouped"], "tie_word_embeddings": False, **settings}
    if "norm_eps" in settings:
        del settings["rms_norm_eps"]
    return build(settings.pop("model_type"), **settings)


def build(model_type: str, **settings: Any) -> Any:
    torch.manual_seed(1)
    settings = {**SHARED, "initializer_range": 0.15, **settings}
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.uniform_(0.5, 1.5)
            elif key.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
    return model.eval()


def save(model: PreTrainedModel, directory: Path, shard_size: str = "5GB") -> Path:
    """What `save_pretrained` writes, with the tokenizer."""
    model.save_pretrained(directory, max_shard_size=shard_size)
    tokenizer().save_pretrained(directory)
    return directory


def write_gguf(model: LlamaForCausalLM, path: Path, **changes: object) -> Path:
    """The model as a float32 GGUF; `changes` override metadata, None leaves a key out."""
    config = model.config
    backend = tokenizer().backend_tokenizer
    vocabulary = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    tokens = [token for token, _ in vocabulary] + ["<extra>"]
    merges = [" ".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    metadata: dict[str, object] = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": config.rope_theta,
        "llama.rope.dimension_count": config.head_dim,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 1,
    }
    writer = GGUFWriter(str(path), str(changes.pop("architecture", "llama")))
    for key, value in {**metadata, **changes}.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, int(value))  # type: ignore[call-overload]
    for name, array in gguf_tensors(model).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(model: LlamaForCausalLM) -> dict[str, NDArray[Any]]:
    """llama.cpp's names, and its order of the rows of q and k."""
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
    }
    if not model.config.tie_word_embeddings:
        tensors["output.weight"] = state["lm_head.weight"]
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    for layer in range(model.config.num_hidden_layers):
        for theirs, ours in names.items():
            array = state[f"model.layers.{layer}.{theirs}.weight"]
            if ours in heads:
                n, (out, hidden) = heads[ours], array.shape
                array = array.reshape(n, 2, out // n // 2, hidden).swapaxes(1, 2)
                array = array.reshape(out, hidden)
            tensors[f"blk.{layer}.{ours}.weight"] = np.ascontiguousarray(array)
    return tensors


@cache
def sentencepiece_model() -> bytes:
    """Of the same text, 300 tokens, as a `.model` file has it."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=model,
        vocab_size=300,
        minloglevel=2,
    )
    return model.getvalue()
