"""Megatron-LM's arguments as the settings of a GPTModel.

Names, defaults and meanings are those of `megatron/training/arguments.py` and
`core_transformer_config_from_args`, in the versions that go with megatron-core 0.13 to 0.19.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from nemo_kd.checkpoints.model import CheckpointError, Rope, RopeScaling, checked
from nemo_kd.checkpoints.nemo_settings import BY_LOSS, LOAD_BALANCING, is_by_loss
from nemo_kd.mcore.gpt import UNUSED_BASE, GPTSettings, squared_relu

REQUIRED = object()
RENAMED = {
    "norm_epsilon": "layernorm_epsilon",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
}
"""Arguments of the older versions, and their names in 0.19."""
READ: dict[str, Any] = {
    "num_layers": REQUIRED,
    "hidden_size": REQUIRED,
    "num_attention_heads": REQUIRED,
    "max_position_embeddings": REQUIRED,
    "position_embedding_type": REQUIRED,
    "normalization": REQUIRED,
    "swiglu": REQUIRED,
    "group_query_attention": REQUIRED,
    "untie_embeddings_and_output_weights": REQUIRED,
    "ffn_hidden_size": None,
    "kv_channels": None,
    "num_query_groups": None,
    "layernorm_epsilon": 1e-5,
    "layernorm_zero_centered_gamma": False,
    "add_bias_linear": True,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "squared_relu": False,
    "apply_residual_connection_post_layernorm": False,
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "use_rope_scaling": False,
    "rope_scaling_factor": 8.0,
    "softmax_scale": None,
    "window_size": None,
    "num_experts": None,
    "moe_ffn_hidden_size": None,
    "moe_layer_freq": 1,
    "moe_router_topk": 2,
    "moe_router_pre_softmax": False,
    LOAD_BALANCING: "aux_loss",
    "make_vocab_size_divisible_by": 128,
}
"""Arguments that are converted, and Megatron-LM's defaults."""
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
    r"|mla_\w+|rotary_scaling_factor|swin\w+|vision_\w+|dsa_\w+|mamba\w+"
    # The older name of position_embedding_type=rope, which Megatron-LM sets and saves beside it.
    r"|use_rotary_position_embeddings"
    # Scales of losses, gradients and optimizers.
    r"|(\w+_)?(loss|grad)_scal\w+|muon_\w+|retriever_\w+"
)
Arguments = Mapping[str, Any]


def settings_of_arguments(name: str, stored: Arguments, given: Arguments) -> GPTSettings:
    """Return the settings of a model from its checkpoint's arguments and those that it lacks.

    Errors: CheckpointError for an argument that is missing, unknown, given with another value than
    the checkpoint's, or not supported.
    """
    args = _renamed(stored)
    for key, value in _renamed(given).items():
        if key not in {*READ, *NEUTRAL, "padded_vocab_size"}:
            raise CheckpointError(
                f"teacher.arguments.{key} is not an argument of a model that is read; those are "
                f"{', '.join(READ)}"
            )
        if args.get(key, value) not in (value, None):
            raise CheckpointError(
                f"{name}: its argument {key} is {args[key]!r}, but teacher.arguments.{key} is "
                f"{value!r}; leave it out"
            )
        args[key] = value
    _refuse_unsupported(name, args)
    missing = [
        key for key, default in READ.items() if default is REQUIRED and args.get(key) is None
    ]
    if missing:
        raise CheckpointError(
            f"{name}: it lacks Megatron-LM's arguments {', '.join(missing)}; give them as "
            f"teacher.arguments={{{missing[0]}: VALUE, ...}}"
        )
    read = {key: default if args.get(key) is None else args[key] for key, default in READ.items()}
    return _settings(name, read)


def _renamed(args: Arguments) -> dict[str, Any]:
    return {RENAMED.get(key, key): value for key, value in args.items()}


def _refuse_unsupported(name: str, args: Arguments) -> None:
    for key, value in args.items():
        if key in READ or key == "padded_vocab_size":
            known = not isinstance(value, Mapping)  # an object of Bridge
        elif key in NEUTRAL:
            known = value in NEUTRAL[key] or not value
        else:
            parts = f"_{key}"
            model_like = any(OF_A_MODEL.match(parts, at.end()) for at in re.finditer("_", parts))
            known = not value or not model_like or HARMLESS.fullmatch(key) is not None
        if not known:
            raise CheckpointError(
                f"{name}: its argument {key}={value!r} is not supported; the model would be "
                "another one"
            )


def _settings(name: str, args: dict[str, Any]) -> GPTSettings:
    hidden, heads = args["hidden_size"], args["num_attention_heads"]
    kind = args["position_embedding_type"]
    if kind not in ("rope", "learned_absolute", "none"):
        raise CheckpointError(f"{name}: position_embedding_type={kind!r} is not supported")
    if args["normalization"] not in ("LayerNorm", "RMSNorm"):
        raise CheckpointError(f"{name}: normalization={args['normalization']!r} is not supported")
    wide = 4 * hidden if not args["swiglu"] else int(4 * hidden * 2 / 3 / 64) * 64
    config: dict[str, Any] = {
        "num_layers": args["num_layers"],
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "ffn_hidden_size": args["ffn_hidden_size"] or wide,
        "kv_channels": args["kv_channels"] or hidden // heads,
        "num_query_groups": args["num_query_groups"] if args["group_query_attention"] else heads,
        "gated_linear_unit": args["swiglu"],
        "activation_func": _activation(args),
    }
    same = (
        *("normalization", "layernorm_epsilon", "layernorm_zero_centered_gamma"),
        *("add_bias_linear", "add_qkv_bias", "qk_layernorm", "rotary_interleaved"),
        "apply_residual_connection_post_layernorm",
    )
    config |= {key: args[key] for key in same}
    if args["window_size"] is not None:
        config["window_size"] = tuple(args["window_size"])
    if args["softmax_scale"] is not None:
        config["softmax_scale"] = args["softmax_scale"]
    return GPTSettings(
        config=config | _experts(name, args),
        vocab_size=1,  # that of the checkpoint's embedding
        max_sequence_length=args["max_position_embeddings"],
        position_embedding_type=kind,
        rope=_rope(name, args) if kind == "rope" else Rope(base=UNUSED_BASE),
        tied=not args["untie_embeddings_and_output_weights"],
        vocabulary_multiple=args["make_vocab_size_divisible_by"],
    )


def _activation(args: Arguments) -> Callable[[torch.Tensor], torch.Tensor]:
    if args["swiglu"]:
        return torch.nn.functional.silu
    return squared_relu if args["squared_relu"] else torch.nn.functional.gelu


def _experts(name: str, args: Arguments) -> dict[str, Any]:
    if args["num_experts"] is None:
        return {}
    if args["moe_layer_freq"] not in (1, "1", [1] * args["num_layers"]):
        raise CheckpointError(
            f"{name}: moe_layer_freq={args['moe_layer_freq']!r}: layers without experts beside "
            "those with them are not supported"
        )
    if not is_by_loss(args[LOAD_BALANCING]):
        raise CheckpointError(
            f"{name}: {LOAD_BALANCING}={args[LOAD_BALANCING]!r} routes tokens to other experts "
            f"than the top-k logits; supported are {', '.join(BY_LOSS)}, and lists of them"
        )
    return {
        "num_moe_experts": args["num_experts"],
        "moe_router_topk": args["moe_router_topk"],
        "moe_router_pre_softmax": args["moe_router_pre_softmax"],
        "moe_ffn_hidden_size": args["moe_ffn_hidden_size"] or args["ffn_hidden_size"],
        LOAD_BALANCING: "aux_loss",
        "moe_aux_loss_coeff": 0.0,
    }


def _rope(name: str, args: Arguments) -> Rope:
    scaling = None
    if args["use_rope_scaling"]:  # with Megatron-core's constants, those of Llama 3.1
        scaling = RopeScaling(args["rope_scaling_factor"], 1.0, 4.0, 8192)
    values = {
        "base": args["rotary_base"],
        "fraction": args["rotary_percent"],
        "interpolation": args["rotary_seq_len_interpolation_factor"],
    }
    return checked(f"{name}: its arguments", {**values, "llama3": scaling}, Rope)
