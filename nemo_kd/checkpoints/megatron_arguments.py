"""Megatron-LM's arguments that would make another model of the same weights.

A dump reads a model's settings from the arguments of its training, and an export compares them with
those of a `config.json`. Both refuse an argument that is neither converted nor known to leave the
logits unchanged. Names and values are those of megatron-core 0.13 to 0.19.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

RENAMED = {
    "norm_epsilon": "layernorm_epsilon",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
}
"""Arguments of the older versions, and their names in 0.19."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_position_embedding": (True,),
    "openai_gelu": (False,),
    "quick_geglu": (False,),
    "glu_linear_offset": (0, 0.0),
    "activation_func_clamp_value": (None,),
    "qk_l2_norm": (False,),
    "qk_clip": (False,),  # changes weights in training
    "attention_output_gate": (False,),
    "softmax_type": ("vanilla",),
    "no_rope_freq": (None,),
    "window_attn_skip_freq": (None,),
    "multi_latent_attention": (False,),
    "experimental_attention_variant": (None,),
    "linear_attention_freq": (None,),
    "heterogeneous_layers_config_path": (None,),
    "heterogeneous_layers_config_encoded_json": (None,),
    "hybrid_layer_pattern": (None,),
    "hybrid_override_pattern": (None,),
    "spec": (None,),
    "use_mup": (False,),
    "fp8": (None,),
    "fp4": (None,),
    "fp32_residual_connection": (False,),
    "rope_type": (None, "rope"),
    "mrope_section": (None,),
    "relative_attention_num_buckets": (None, 32),
    "relative_attention_max_distance": (None, 128),
    "encoder_num_layers": (None,),
    "moe_latent_size": (None,),
    "moe_shared_expert_intermediate_size": (None,),
    "moe_shared_expert_gate": (False,),
    "moe_router_score_function": ("softmax",),
    "moe_router_topk_scaling_factor": (None,),
    "moe_router_num_groups": (None,),
    "moe_router_group_topk": (None,),
    "moe_router_topk_limited_devices": (None,),
    "moe_router_enable_expert_bias": (False,),
    "moe_router_force_load_balancing": (False,),
    "moe_router_force_biased": (None,),
    "moe_expert_capacity_factor": (None,),
    "moe_expert_rank_capacity_factor": (None,),
    "moe_apply_probs_on_input": (False,),
    "moe_mlp_glu_interleave_size": (None,),
    "moe_token_dropping": (False,),
}
"""Arguments that would change the logits, and their values that do not."""
PRECISION = ("fp8", "fp4", "fp32_residual_connection")
"""Arguments that round a training's activations; the weights are exported as they are."""
OF_A_MODEL = re.compile(
    r"(rope|rotary|yarn|mrope|qk_|kv_|attn|attention|softmax|window|glu|gelu|relu|activation_func"
    r"|moe_router|moe_shared|moe_latent|mup|mla|lora_rank|norm|heterogeneous|hybrid|residual"
    r"|(scale|scaling|multiplier|softcap|freq|nope)(_|$))"
)
"""What the names of a model's arguments begin with or have after an underscore."""
HARMLESS = re.compile(
    # Kernels, and how a training computes, splits, saves or reports.
    r"(no_)?persist_layer_norm|\w*(fusion|backend|flash_\w+|_impl|kernel)|use_flash_attn"
    r"|\w*(recompute|checkpoint|offload|fp8|fsdp|sharding|context_parallel|inference|dropout"
    r"|log_|logging|_grad|grad_|wandb|memory_efficient)\w*|memory_efficient_layer_norm"
    r"|attention_softmax_in_fp32|apply_query_key_layer_scaling|hybrid_context_parallel"
    r"|moe_router_(dtype|bias_update_rate|padding_for_\w+|fusion|quantile_\w+)"
    r"|moe_hybridep_\w+|rl_\w+|create_attention_mask_in_dataloader"
    r"|moe_shared_expert_overlap|mlp_chunks\w+|fused_residual_rmsnorm|fused_single_qkv_rope"
    # Settings of what is refused or off without another argument, and of other models.
    r"|qk_clip_\w+|qk_head_dim|qk_pos_emb_head_dim|kv_lora_rank|q_lora_rank|yarn_\w+|mup_\w+"
    r"|mla_\w+|rotary_scaling_factor|swin\w+|vision_\w+|dsa_\w+|mamba\w+|retro_\w+"
    # The older name of position_embedding_type=rope, which Megatron-LM sets and saves beside it.
    r"|use_rotary_position_embeddings"
    # Scales of losses, gradients and optimizers.
    r"|(\w+_)?(loss|grad)_scal\w+|muon_\w+|retriever_\w+"
)


def renamed(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments under their names in 0.19."""
    return {RENAMED.get(key, key): value for key, value in args.items()}


def unsupported(args: Mapping[str, Any], read: Collection[str]) -> str | None:
    """Return the name of the first argument that would change the logits; None without one.

    `read`: names that the caller converts or compares itself.
    """
    known = {*read, "padded_vocab_size"}
    if args.get("num_layers") in (None, args.get("encoder_num_layers")):
        known.add("encoder_num_layers")  # Megatron-LM sets the older name to the same
    for key, value in args.items():
        if key in known:
            is_known = not isinstance(value, Mapping)  # an object of Bridge
        else:
            is_known = not value or _is_neutral(key, value)
        if not is_known:
            return key
    return None


def _is_neutral(key: str, value: Any) -> bool:
    if key in NEUTRAL:
        return value in NEUTRAL[key]
    parts = f"_{key}"
    model_like = any(OF_A_MODEL.match(parts, at.end()) for at in re.finditer("_", parts))
    return not model_like or HARMLESS.fullmatch(key) is not None


def in_all_layers(frequency: Any, layers: int) -> bool:
    """Return whether a `moe_layer_freq` gives experts to each of the layers."""
    return frequency in (1, "1") or (
        isinstance(frequency, list | tuple) and list(frequency) == [1] * layers
    )
