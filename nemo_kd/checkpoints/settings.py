"""Settings of a `config.json` that transformers 5 wrote, under the names that transformers 4 reads.

transformers 5 has RoPE's base, fraction and scaling in one dict, `rope_parameters`, by layer type
for some families; `dtype` is `torch_dtype`. Formats: `modeling_rope_utils.py` and
`configuration_utils.py` of transformers 4.51 and 5.0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from nemo_kd.errors import NemoKDError

RENAMED = {"dtype": "torch_dtype", "_sliding_window_pattern": "sliding_window_pattern"}
BASES, FRACTIONS = ("rope_theta", "rotary_emb_base"), ("partial_rotary_factor", "rotary_pct")
"""A family's names of RoPE's base, and of the rotated fraction of a head."""

ROPE_KEYS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "yarn": {
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast"),
        *("beta_slow", "mscale", "mscale_all_dim"),
    },
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor"},
    "llama3": {
        *("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    },
}
"""Keys of `rope_scaling` that transformers 4.51 computes with, by type."""


HARMLESS = re.compile(
    # Records of who wrote the file, and how.
    r"auto_map|unsloth_\w+|transformers\.js_config|_\w*attn\w*|use_flash_attn\w*|use_mambapy"
    r"|use_falcon_mambapy|ignore_keys_at_rope_validation|model_max_length|use_cache|cache_\w+"
    # What training alone computes with.
    r"|\w*(dropout|drop|pdrop)|\w*initializer\w*|\w*(loss|aux)_coef\w*|output_router_logits"
    # Biases and norms whose tensors are missed if the model should have them, and left over if not.
    r"|(use_)?(attention|attn|mlp|ffn|qkv|q|k|v|o|proj|conv|linear|lm_head|head)(_\w+)?_bias"
    r"|use_qk_norm|qk_layernorm"
    # Ids of the parts of a prompt that are no text; tokens that end or pad one.
    r"|(image|video|audio|vision|boi|eoi)\w*_token(_id|_index)?|\w*(bos|eos|pad|sep)_token(_id)?"
    # Layers that predict further tokens, beside the model.
    r"|num_nextn_predict_layers"
)
"""Keys that do not change the logits of a text, known to the class or not."""

OFF: dict[str, tuple[Any, ...]] = {
    "use_bidirectional_attention": (False,),
    "use_mrope": (False,),
    "use_parallel_residual": (False,),
    "use_sliding_window": (False,),
    "position_embedding_type": ("rope", "absolute"),
    "is_llama_config": (True,),  # SmolLM 2
    "rope_interleaved": (False,),
    "full_attn_mod": (1,),  # Phi-4-mini
    "interpolate_factor": (1,),
}
"""Values of unknown keys that name what a model does without the key."""


class SettingsError(NemoKDError):
    """A setting that transformers 4 cannot hold, or would compute with in another way."""


def to_version_4(
    config: Mapping[str, Any], holds: Callable[[str], bool] = lambda key: True
) -> dict[str, Any]:
    """Return the settings of a `config.json` of any version, as transformers 4 reads them.

    `holds(key)`: whether the model's class in transformers 4 reads this key. Nested configurations
    (`text_config`) stay as they are. Raises SettingsError for settings without an equivalent.
    """
    settings = {key: _number(value) for key, value in config.items()}
    for new, old in RENAMED.items():
        if new in settings and holds(old) and not holds(new):
            settings[old] = settings.pop(new)
    activation = settings.get("hidden_act")  # Gemma's older name of hidden_activation, beside it
    if settings.get("hidden_activation") == activation and not holds("hidden_act"):
        settings.pop("hidden_act", None)
    parameters = settings.get("rope_parameters")
    if isinstance(parameters, Mapping) and not holds("rope_parameters"):
        del settings["rope_parameters"]
        settings |= _rope(dict(parameters), settings, holds)
    scaling = settings.get("rope_scaling")
    if isinstance(scaling, Mapping):
        settings |= _checked_scaling(dict(scaling), settings, holds)
    return settings


def _number(value: Any) -> Any:
    """Return the float that `{"__float__": "Infinity"}` stands for, also within a list."""
    if isinstance(value, list):
        return [_number(one) for one in value]
    if isinstance(value, Mapping) and set(value) == {"__float__"}:
        return float(value["__float__"])
    return value


def _rope(
    parameters: dict[str, Any], settings: Mapping[str, Any], holds: Callable[[str], bool]
) -> dict[str, Any]:
    """Return the keys of transformers 4 for `rope_parameters`."""
    found: dict[str, Any] = {}
    by_type = {key: value for key, value in parameters.items() if isinstance(value, Mapping)}
    others = [value for key, value in parameters.items() if key not in by_type]
    # Gemma 3's has, beside those of its layer types, empty settings for all of them.
    if by_type and all(value in (None, "default") for value in others):
        parameters, found = _of_layer_types(by_type, holds)
    base = parameters.pop("rope_theta", None)
    if base is not None:
        key = next(filter(holds, BASES), BASES[0])
        if settings.get(key) not in (None, base):
            raise SettingsError(
                f"{key} is {settings[key]}, but {base} in rope_parameters; remove the wrong one"
            )
        found[key] = base
    fraction = parameters.pop("partial_rotary_factor", None)
    name = next(filter(holds, FRACTIONS), None)
    if fraction is not None and (name or fraction != 1):
        found[name or FRACTIONS[0]] = fraction
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "yarn" and parameters.get("factor") and _original(parameters):
        # transformers 4 computes the factor as the ratio of both.
        found["max_position_embeddings"] = int(parameters["factor"] * _original(parameters))
    if kind == "longrope":
        found["rope_scaling"] = _longrope(parameters, settings)
    elif kind != "default" or set(parameters) - {"rope_type", "type"}:
        found["rope_scaling"] = parameters
    elif holds("rope_scaling"):
        found["rope_scaling"] = None
    return found


def _longrope(parameters: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that Phi-3 allows; the factor is the ratio of the two contexts."""
    scaling = {"type": "longrope", **parameters}
    scaling.pop("rope_type", None)
    original, context = _original(parameters), settings.get("max_position_embeddings")
    if original and context and scaling.get("factor") == context / original:
        del scaling["factor"]
    return scaling


def _of_layer_types(
    parameters: Mapping[str, Any], holds: Callable[[str], bool]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the parameters of full attention, and the keys for those of a sliding window."""
    full, *others = sorted(parameters, key=lambda kind: kind != "full_attention")
    kinds = [dict(parameters[kind]) for kind in (full, *others)]
    if all(kind == kinds[0] for kind in kinds):
        return kinds[0], {}
    if [full, *others] == ["full_attention", "sliding_attention"] and holds("rope_local_base_freq"):
        local = kinds[1]
        base = local.pop("rope_theta", None)
        if base is not None and local in ({}, {"rope_type": "default"}):
            return kinds[0], {"rope_local_base_freq": base}
    raise SettingsError(
        f"rope_parameters has different settings for {', '.join(parameters)}, which transformers 4 "
        "cannot hold for this model"
    )


def _checked_scaling(
    scaling: dict[str, Any], settings: Mapping[str, Any], holds: Callable[[str], bool]
) -> dict[str, Any]:
    """Return `rope_scaling` and what belongs to it; raise SettingsError for what is not read."""
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ROPE_KEYS:
        return {}  # a family's own type, or an error of transformers
    found: dict[str, Any] = {"rope_scaling": scaling}
    original, context = _original(scaling), settings.get("max_position_embeddings")
    if kind == "longrope":  # transformers 4 has it beside rope_scaling
        top = settings.get("original_max_position_embeddings")
        if None not in (top, original) and top != original:
            raise SettingsError(
                f"original_max_position_embeddings is {top}, but {original} in RoPE's settings"
            )
        original = top if original is None else original
        scaling.pop("original_max_position_embeddings", None)
        if original is not None:
            found["original_max_position_embeddings"] = original
    if kind in ("default", "linear", "dynamic") and original in (None, context):
        scaling.pop("original_max_position_embeddings", None)
    if kind == "yarn" or (kind == "longrope" and scaling.get("attention_factor") is None):
        _check_ratio(kind, scaling.get("factor"), context, original)
    unread = [
        key
        for key, value in scaling.items()
        if value is not None
        and key not in {"rope_type", "type", *ROPE_KEYS[kind]}
        and not holds(key)
    ]
    if unread:
        named = ", ".join(f"{key}={scaling[key]!r}" for key in unread)
        words = ("setting", "is") if len(unread) == 1 else ("settings", "are")
        raise SettingsError(
            f"RoPE's {words[0]} {named} (rope_type={kind}) {words[1]} not read by transformers 4"
        )
    return found


def _original(scaling: Mapping[str, Any]) -> Any:
    return scaling.get("original_max_position_embeddings")


def _check_ratio(kind: str, factor: Any, context: Any, original: Any) -> None:
    """Raise SettingsError if transformers 4, which divides `context`, finds another factor."""
    if factor is None or context is None or original is None or factor * original == context:
        return
    raise SettingsError(
        f"RoPE's factor is {factor} (rope_type={kind}), but transformers 4 computes with "
        f"max_position_embeddings / original_max_position_embeddings = {context / original:g}; set "
        f"max_position_embeddings to {factor * original:g} in config.json"
    )
