"""NeMo's `model` section as a `config.json`, and what of it decides the logits.

A student's section begins as that of its conversion, but a training may have changed any of it, and
a model that NeMo made has no `config.json` at all. So each export compares all settings of
`DEFAULTS` with those of the `config.json` that it writes, and refuses the first that differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_kd.checkpoints.huggingface import cut_layers
from nemo_kd.checkpoints.megatron_arguments import NEUTRAL, PRECISION, unsupported
from nemo_kd.checkpoints.model import CheckpointError, Model
from nemo_kd.checkpoints.nemo_file import model_config
from nemo_kd.checkpoints.settings import to_version_4
from nemo_kd.checkpoints.source import CONVERTED

DEFAULTS: dict[str, Any] = {
    "num_layers": 1,
    "hidden_size": None,
    "ffn_hidden_size": None,
    "num_attention_heads": None,
    "num_query_groups": None,
    "kv_channels": None,
    "normalization": "layernorm",
    "layernorm_epsilon": 1e-5,
    "activation": "gelu",
    "bias": True,
    "qkv_bias": False,
    "qk_layernorm": False,
    "position_embedding_type": "learned_absolute",
    "rotary_percentage": 1.0,
    "rotary_base": 10000,
    "rotary_interleaved": False,
    "rope_frequencies": None,
    "seq_len_interpolation_factor": None,
    "scale_positional_embedding": False,
    "window_size": None,
    "softmax_scale": None,
    "attention_type": "multihead",
    "transformer_block_type": "pre_ln",
    "normalize_attention_scores": True,
    "headscale": False,
    "openai_gelu": False,
    "apply_residual_connection_post_layernorm": False,
    "multi_latent_attention": False,
    "apply_embedding_scaling": False,
    "mcore_customization_config": None,
    "drop_layers": None,
    "no_rope_freq": None,
    "num_moe_experts": None,
    "share_embeddings_and_output_weights": True,
    "activation_func_clamp_value": None,
    "heterogeneous_block_specs": False,
}
"""Settings that decide the logits, and what NeMo 2.4 takes where one is missing."""
LLAMA3 = {"scale_factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "old_context_len": 8192}
LOAD_BALANCING = "moe_router_load_balancing_type"
BY_LOSS = ("aux_loss", "seq_aux_loss", "global_aux_loss", "none")
"""Ways to balance experts that change the training's loss, not the router; `sinkhorn` does."""
EXPERTS = {
    LOAD_BALANCING: "aux_loss",
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": None,
    "moe_router_pre_softmax": False,
    "moe_layer_freq": 1,
    "moe_shared_expert_intermediate_size": None,
    "moe_router_score_function": "softmax",
    "moe_router_topk_scaling_factor": None,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_router_topk_limited_devices": None,
    "moe_router_force_load_balancing": False,
    "moe_token_dropping": False,
    "moe_router_enable_expert_bias": False,
    "moe_apply_probs_on_input": False,
    "moe_expert_capacity_factor": None,
}
"""Settings that count only with Llama 3's scaling, or with experts."""


def check(name: str, section: Mapping[str, Any], model: Model) -> None:
    """Raise CheckpointError if NeMo's `section` is another model than that of a config.json."""
    expected = effective(model_config(model))
    for key, value in effective(section).items():
        if value != expected.get(key, (DEFAULTS | LLAMA3 | EXPERTS)[key]):
            raise CheckpointError(
                f"{name}: model.{key} is {value!r}, but a {model.architecture} of its config.json "
                f"computes with {expected.get(key)!r}; the export would be another model. If a "
                "training has changed the setting, give --base with a config.json that has it"
            )
    other = unsupported(_others(section), ())
    if other is not None:
        raise CheckpointError(
            f"{name}: model.{other} is {section[other]!r}, which no config.json of a "
            f"{model.architecture} has; the export would be another model"
        )


def _others(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return further settings of Megatron-core that NeMo's later versions pass on to it."""
    compared = {*DEFAULTS, *EXPERTS, *PRECISION}
    return {
        key: section[key]
        for key in NEUTRAL
        if key in section
        and key not in compared
        and (section.get("num_moe_experts") or not key.startswith("moe_"))
    }


def effective(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a section that decide the logits, defaults filled in."""
    found = _filled(section, DEFAULTS)
    found["normalization"] = str(found["normalization"]).lower()
    heads, hidden = found["num_attention_heads"], found["hidden_size"]
    if heads and hidden:
        found["num_query_groups"] = found["num_query_groups"] or heads
        found["kv_channels"] = found["kv_channels"] or hidden // heads
    found["ffn_hidden_size"] = found["ffn_hidden_size"] or 4 * (hidden or 0)
    if found["rope_frequencies"] is not None:
        found["rotary_base"] = None  # not read
    if found["scale_positional_embedding"]:
        found |= _filled(section, LLAMA3)
    if found["num_moe_experts"]:
        found |= _filled(section, EXPERTS)
        found["moe_ffn_hidden_size"] = found["moe_ffn_hidden_size"] or found["ffn_hidden_size"]
        if is_by_loss(found[LOAD_BALANCING]):
            found[LOAD_BALANCING] = EXPERTS[LOAD_BALANCING]
    return found


def is_by_loss(balancing: Any) -> bool:
    """Return whether a `moe_router_load_balancing_type`, one or a list, leaves the router as is."""
    kinds = balancing if isinstance(balancing, list | tuple) else [balancing]
    return all(kind in BY_LOSS for kind in kinds)


def _filled(section: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    values = {key: section.get(key) for key in defaults}
    return {key: defaults[key] if value is None else value for key, value in values.items()} | {
        key: list(value) for key, value in values.items() if isinstance(value, tuple)
    }


def config_of(name: str, section: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of a section: the one of its conversion, or that of a Llama.

    Errors: CheckpointError for layers that are not those of the conversion.
    """
    converted = section.get(CONVERTED) or {}
    if not isinstance(converted.get("config"), Mapping):
        return _llama(section)
    config, layers = dict(converted["config"]), list(converted["layers"])
    if len(layers) != section.get("num_layers"):
        raise CheckpointError(
            f"{name}: model.num_layers is {section.get('num_layers')}, but it was converted with "
            f"{len(layers)} layers; give --base with the config.json of its layers"
        )
    kind = {key: config[key] for key in ("model_type",) if key in config}
    return kind | both_versions(cut_layers(config, layers))


def both_versions(config: Mapping[str, Any]) -> dict[str, Any]:
    """Add transformers 4's keys to a config.json of transformers 5, which reads both."""
    if not isinstance(config.get("rope_parameters"), Mapping):
        return dict(config)
    older = to_version_4(config, lambda key: key != "rope_parameters")
    return {**config, **{key: value for key, value in older.items() if key not in config}}


def _llama(section: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a Llama, or with biases of queries, keys and values a Qwen 2."""
    found = effective(section)
    family = ("Qwen2ForCausalLM", "qwen2") if found["qkv_bias"] else ("LlamaForCausalLM", "llama")
    config = {
        "architectures": [family[0]],
        "model_type": family[1],
        "hidden_act": "silu",
        "hidden_size": found["hidden_size"],
        "intermediate_size": found["ffn_hidden_size"],
        "num_hidden_layers": found["num_layers"],
        "num_attention_heads": found["num_attention_heads"],
        "num_key_value_heads": found["num_query_groups"],
        "head_dim": found["kv_channels"],
        "max_position_embeddings": section.get("max_position_embeddings")
        or section.get("encoder_seq_length"),
        "rms_norm_eps": found["layernorm_epsilon"],
        "rope_theta": float(found["rotary_base"] or 10000),
    }
    if found["seq_len_interpolation_factor"] is not None:
        factor = float(found["seq_len_interpolation_factor"])
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif found["scale_positional_embedding"]:
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": float(found["scale_factor"]),
            "low_freq_factor": float(found["low_freq_factor"]),
            "high_freq_factor": float(found["high_freq_factor"]),
            "original_max_position_embeddings": found["old_context_len"],
        }
    return config
