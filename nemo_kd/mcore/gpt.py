"""Build Megatron-core's GPTModel for a model of a checkpoint, on any layout.

    settings = settings_of(open_checkpoint("Llama-3.2-1B").model)
    chunks = build(settings, params_dtype=torch.bfloat16, bf16=True)
    load_weights(chunks, HuggingFaceTensors(checkpoint))

`parallel_state.initialize_model_parallel` and `model_parallel_cuda_manual_seed` come first. Layers
are TransformerEngine's on a GPU that has it, Megatron-core's own otherwise; megatron-core 0.13 to
0.19.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig

from nemo_kd.checkpoints.families import family_of
from nemo_kd.checkpoints.model import CheckpointError, Model, Rope, RopeScaling
from nemo_kd.mcore.cpu import local_layer_spec

UNUSED_BASE = 10000.0
VOCABULARY_MULTIPLE = 128
"""Megatron's default for `make_vocab_size_divisible_by`."""


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.relu(x).square()


@dataclass(frozen=True, kw_only=True)
class GPTSettings:
    """What decides the logits of a GPTModel, apart from its weights."""

    config: Mapping[str, Any]
    """Fields of `TransformerConfig`."""
    vocab_size: int
    """Rows of the embedding in the checkpoint, without or with padding."""
    max_sequence_length: int
    position_embedding_type: str = "rope"
    rope: Rope = field(default_factory=lambda: Rope(base=UNUSED_BASE))
    tied: bool = False
    """Whether the LM head shares the embedding's weight."""
    max_tokens: int | None = None
    """Longer sequences need a setting that Megatron does not have; None without a limit."""
    vocabulary_multiple: int = VOCABULARY_MULTIPLE
    """The embedding's rows are padded to a multiple of this, times the tensor-parallel size."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `GPTModel`."""

    @property
    def max_positions(self) -> int | None:
        """Number of learned positions; None without a limit."""
        learned = self.position_embedding_type == "learned_absolute"
        return self.max_sequence_length if learned else None

    def limit(self) -> tuple[int, str] | None:
        """Return the number of tokens up to which the model is this one, and why; None if any."""
        limits = []
        if self.max_tokens is not None:
            limits.append((self.max_tokens, "its positions or its attention change"))
        window = self.config.get("window_size")
        if window is not None and not has_transformer_engine():
            reason = "its sliding window needs TransformerEngine's attention"
            limits.append((window[0] + 1, reason))
        return min(limits) if limits else None


def settings_of(model: Model) -> GPTSettings:
    """Return the settings of a Hugging Face model of one of `checkpoints.families`."""
    family = family_of(model)
    norm = "LayerNorm" if family.norm == "layernorm1p" else "RMSNorm"
    config: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_heads,
        "num_query_groups": model.num_kv_heads,
        "kv_channels": model.head_dim,
        "normalization": norm,
        "layernorm_zero_centered_gamma": norm == "LayerNorm",
        "layernorm_epsilon": model.norm_eps,
        "gated_linear_unit": family.gated,
        "activation_func": torch.nn.functional.silu if family.gated else squared_relu,
        "add_bias_linear": False,
        "add_qkv_bias": family.qkv_bias,
        "qk_layernorm": family.qk_norm,
    }
    if model.window is not None:
        config["window_size"] = (model.window - 1, 0)
    if model.rope.attention_factor != 1:  # of queries and of keys
        config["softmax_scale"] = model.rope.attention_factor**2 / math.sqrt(model.head_dim)
    if model.experts is not None:
        config |= {
            "num_moe_experts": model.experts.number,
            "moe_router_topk": model.experts.active,
            "moe_ffn_hidden_size": model.experts.ffn_hidden_size,
            # Softmax over all experts, or over the active ones alone.
            "moe_router_pre_softmax": not model.experts.normalized,
            "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": 0.0,
        }
    return GPTSettings(
        config=config,
        vocab_size=model.vocab_size,
        max_sequence_length=model.context,
        rope=model.rope,
        tied=model.tied,
        max_tokens=model.max_tokens,
    )


def build(
    settings: GPTSettings,
    *,
    vocab_size: int | None = None,
    virtual: int = 1,
    **changes: Any,
) -> list[GPTModel]:
    """Build this rank's GPTModels: one, or `virtual` of them with a virtual pipeline.

    The layout is that of `parallel_state`. `vocab_size`: rows of the embedding before padding, by
    default those of the checkpoint. `changes` are fields of `TransformerConfig`, such as
    `sequence_parallel`, `params_dtype` and what a training sets. The weights are random. A model
    that `GPTSettings.limit` limits has it as `token_limit`: `StepLoss` refuses longer sequences.

    Errors: CheckpointError for a setting that this megatron-core does not have, or that cannot be
    divided by the layout.
    """
    config = transformer_config(settings, virtual=virtual, **changes)
    multiple = settings.vocabulary_multiple * config.tensor_model_parallel_size
    rows = -(-(vocab_size or settings.vocab_size) // multiple) * multiple
    chunks = []
    for chunk in range(virtual):
        stage: dict[str, Any] = {"vp_stage": chunk} if virtual > 1 else {}
        where = {"ignore_virtual": virtual == 1, **stage}
        gpt = GPTModel(
            config,
            layer_spec(config),
            vocab_size=rows,
            max_sequence_length=settings.max_sequence_length,
            pre_process=parallel_state.is_pipeline_first_stage(**where),
            post_process=parallel_state.is_pipeline_last_stage(**where),
            parallel_output=True,
            share_embeddings_and_output_weights=settings.tied,
            position_embedding_type=settings.position_embedding_type,
            rotary_percent=settings.rope.fraction,
            rotary_base=settings.rope.base,
            seq_len_interpolation_factor=settings.rope.interpolation,
            **settings.fields,
            **stage,
        )
        _set_frequencies(gpt, settings.rope)
        gpt.token_limit = settings.limit()  # which `StepLoss` compares with each micro-batch
        chunks.append(gpt.to(torch.cuda.current_device()))
    return chunks


def transformer_config(
    settings: GPTSettings, *, virtual: int = 1, **changes: Any
) -> TransformerConfig:
    """Return the TransformerConfig of `settings` on the layout of `parallel_state`.

    Dropout and fusions are off, unless `changes` turn them on.
    """
    interleaves = virtual > 1
    own = {
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": False,
        "apply_query_key_layer_scaling": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": has_transformer_engine(),
        "persist_layer_norm": has_transformer_engine(),
        "gradient_accumulation_fusion": False,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline_model_parallel_size": virtual if interleaves else None,
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        # Batched, messages in both directions between the same two stages would be mixed up.
        "overlap_p2p_comm": interleaves,
        "batch_p2p_comm": not interleaves,
    }
    given = {**own, **settings.config, **changes}
    given.setdefault("pipeline_dtype", given.get("params_dtype", torch.float32))
    if not has_transformer_engine():
        given.pop("window_size", None)  # `limit` keeps sequences within it
    known = {one.name for one in fields(TransformerConfig)}
    if unknown := [name for name in given if name not in known]:
        raise CheckpointError(
            f"this megatron-core has no setting {unknown[0]}, which the model needs; install a "
            "newer one"
        )
    _check_divisible(given)
    return TransformerConfig(**given)


def _check_divisible(given: Mapping[str, Any]) -> None:
    """Raise CheckpointError for sizes that the layout cannot divide."""
    tensor, pipeline = given["tensor_model_parallel_size"], given["pipeline_model_parallel_size"]
    stages = pipeline * (given["virtual_pipeline_model_parallel_size"] or 1)
    divided = {
        "num_attention_heads": tensor,
        "num_query_groups": tensor,
        "ffn_hidden_size": tensor,
        "num_layers": stages,
    }
    for name, size in divided.items():
        if given.get(name) is not None and given[name] % size:
            what = "pipeline stages" if name == "num_layers" else "tensor-parallel ranks"
            raise CheckpointError(
                f"the model's {name} is {given[name]}, which {size} {what} cannot share evenly; "
                "choose a divisor"
            )


def has_transformer_engine() -> bool:
    """Return whether layers are TransformerEngine's: it is installed, and there is a GPU."""
    found = importlib.util.find_spec("transformer_engine") is not None
    return found and torch.cuda.is_available()


def layer_spec(config: TransformerConfig) -> Any:
    """Return the specification of the layers of `config`."""
    if not has_transformer_engine():
        return local_layer_spec(config)
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
    )


def _set_frequencies(gpt: GPTModel, rope: Rope) -> None:
    """Set the angles that GPTModel's own arguments cannot express."""
    if rope.llama3 is not None:
        own = gpt.rotary_pos_emb.inv_freq
        gpt.rotary_pos_emb.inv_freq = llama3_frequencies(own, rope.llama3)
    if rope.frequencies is not None:
        own = gpt.rotary_pos_emb.inv_freq
        given = torch.tensor(rope.frequencies, dtype=own.dtype)
        gpt.rotary_pos_emb.inv_freq = given.to(own.device)


def llama3_frequencies(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Stretch wavelengths λ = 2π / f of Llama 3.1's RoPE; [pairs] → [pairs].

    With r = original_context / λ, s = (r - low) / (high - low) within [0, 1]:
    f' = f · (s + (1 - s) / factor). Source: `_compute_llama3_parameters` of transformers.
    """
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    smooth = (scaling.original_context / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    short = wavelengths < scaling.original_context / high
    scaled = torch.where(
        wavelengths > scaling.original_context / low, frequencies / scaling.factor, between
    )
    return torch.where(short, frequencies, scaled)
