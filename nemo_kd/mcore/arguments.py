"""Megatron-LM's arguments as the settings of a GPTModel.

Names, defaults and meanings are those of `megatron/training/arguments.py` and
`core_transformer_config_from_args`, in the versions that go with megatron-core 0.13 to 0.19.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from nemo_kd.checkpoints.megatron_arguments import (
    NEUTRAL,
    in_all_layers,
    renamed,
    unsupported,
)
from nemo_kd.checkpoints.model import CheckpointError, Rope, RopeScaling, checked
from nemo_kd.checkpoints.nemo_settings import BY_LOSS, LOAD_BALANCING, is_by_loss
from nemo_kd.mcore.gpt import UNUSED_BASE, GPTSettings, squared_relu

REQUIRED = object()
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
Arguments = Mapping[str, Any]


def settings_of_arguments(name: str, stored: Arguments, given: Arguments) -> GPTSettings:
    """Return the settings of a model from its checkpoint's arguments and those that it lacks.

    Errors: CheckpointError for an argument that is missing, unknown, given with another value than
    the checkpoint's, or not supported.
    """
    args = renamed(stored)
    for key, value in renamed(given).items():
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


def _refuse_unsupported(name: str, args: Arguments) -> None:
    key = unsupported(args, READ)
    if key is not None:
        raise CheckpointError(
            f"{name}: its argument {key}={args[key]!r} is not supported; the model would be "
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
    if not in_all_layers(args["moe_layer_freq"], args["num_layers"]):
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
