"""The arguments of a training in Megatron-LM or Megatron-Bridge, compared with a config.json.

An export takes its settings from the config.json of `--base`, but a training may have had others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nemo_kd.checkpoints.arguments import read_arguments
from nemo_kd.checkpoints.families import family_of
from nemo_kd.checkpoints.megatron_arguments import (
    PRECISION,
    in_all_layers,
    renamed,
    unsupported,
)
from nemo_kd.checkpoints.model import CheckpointError, Model, RopeScaling
from nemo_kd.checkpoints.nemo_settings import LOAD_BALANCING, is_by_loss
from nemo_kd.checkpoints.run_config import read_run_config
from nemo_kd.checkpoints.source import Source

ELSEWHERE = ("group_query_attention", "rope_scaling_factor", *PRECISION)
"""Arguments that no single setting of a config.json corresponds to."""


def check_arguments(source: Source, model: Model) -> str | None:
    """Refuse a model of a config.json that computes with other settings than the training had.

    Return a line if the checkpoint has no arguments that can be compared.
    Errors: CheckpointError, naming the first argument that differs, or that no config.json has.
    """
    try:
        stored = read_run_config(source)
        stored = read_arguments(source) if stored is None else stored
    except CheckpointError as error:  # another class of Bridge's models, or not readable
        return f"the settings of the training cannot be compared with those of --base: {error}"
    args = _comparable(renamed(stored))
    if not args:
        return (
            f"{source.path} has no arguments of its training: its settings cannot be compared with "
            "those of --base"
        )
    expected = _expected(model)
    for key, value in args.items():
        if key in expected and value != expected[key]:
            raise CheckpointError(
                f"{source.path}: its training had {key}={value!r}, but a {model.architecture} of "
                f"the config.json of --base computes with {expected[key]!r}; the export would be "
                "another model. Give --base with a config.json that has it"
            )
    other = unsupported(args, {*expected, *ELSEWHERE})
    if other is not None:
        raise CheckpointError(
            f"{source.path}: its training had {other}={args[other]!r}, which no config.json of a "
            f"{model.architecture} has; the export would be another model. Export it with the "
            "program that trained it"
        )
    return None


def _comparable(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments in forms that compare equal if they have the same meaning."""
    found = dict(args)
    if found.get("window_size") is not None:
        found["window_size"] = tuple(found["window_size"])
    if not found.get("use_rope_scaling"):
        found.pop("rope_scaling_factor", None)  # not read
    if found.get("group_query_attention") is False:
        found["num_query_groups"] = found.get("num_attention_heads")
    for key in ("num_query_groups", "kv_channels", "ffn_hidden_size", "moe_ffn_hidden_size"):
        if found.get(key) is None:
            found.pop(key, None)  # derived from others; the shapes are compared
    if found.get("num_experts") is None:
        found = {key: value for key, value in found.items() if not key.startswith("moe_")}
    elif is_by_loss(found.get(LOAD_BALANCING, "none")):
        found[LOAD_BALANCING] = "aux_loss"
    if in_all_layers(found.get("moe_layer_freq"), found.get("num_layers", 0)):
        found["moe_layer_freq"] = 1
    if found.get("position_embedding_type", "rope") != "rope":
        found = {key: value for key, value in found.items() if not key.startswith("rotary_")}
    return found


def _expected(model: Model) -> dict[str, Any]:
    """Return the arguments with which Megatron-LM computes as a config.json does."""
    family, rope, experts = family_of(model), model.rope, model.experts
    one_plus = family.norm == "layernorm1p"
    scale = rope.attention_factor
    expected: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_heads,
        "num_query_groups": model.num_kv_heads,
        "kv_channels": model.head_dim,
        "normalization": "LayerNorm" if one_plus else "RMSNorm",
        "layernorm_zero_centered_gamma": one_plus,
        "layernorm_epsilon": model.norm_eps,
        "swiglu": family.gated,
        "squared_relu": not family.gated,
        "qk_layernorm": family.qk_norm,
        "apply_residual_connection_post_layernorm": False,
        "position_embedding_type": "rope",
        "rotary_base": rope.base,
        "rotary_percent": rope.fraction,
        "rotary_interleaved": False,
        "rotary_seq_len_interpolation_factor": rope.interpolation,
        "use_rope_scaling": rope.llama3 is not None,
        "window_size": None if model.window is None else (model.window - 1, 0),
        "softmax_scale": None if scale == 1 else scale**2 / math.sqrt(model.head_dim),
        "num_experts": None if experts is None else experts.number,
    }
    if rope.llama3 is not None:
        expected["rope_scaling_factor"] = rope.llama3.factor
        # With other constants than Megatron-core's, no argument gives this scaling.
        if rope.llama3 != RopeScaling(rope.llama3.factor, 1.0, 4.0, 8192):
            expected["use_rope_scaling"] = rope.llama3
    if rope.frequencies is not None:  # nor those of yarn and longrope
        expected["rotary_base"] = "the angles of its rope_scaling"
    if experts is not None:
        expected |= {
            "moe_router_topk": experts.active,
            "moe_router_pre_softmax": not experts.normalized,
            LOAD_BALANCING: "aux_loss",
            "moe_layer_freq": 1,
        }
    return expected
