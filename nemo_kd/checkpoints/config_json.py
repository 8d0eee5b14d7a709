"""Read the sizes and constants of a model from its `config.json`.

Every key is read, is one of `WITHOUT_EFFECT`, or is refused: a setting that was passed over would
make another model of the same weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import msgspec

from nemo_kd.checkpoints.families import FAMILIES, REFUSED, Family
from nemo_kd.checkpoints.model import (
    CheckpointError,
    Experts,
    Fraction,
    Layers,
    Model,
    Positive,
    Rope,
    RopeScaling,
    Size,
    checked,
    reading,
)
from nemo_kd.checkpoints.settings import HARMLESS, OFF, SettingsError, to_version_4

FILE = "config.json"
FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of attention in `layer_types`."""
WITHOUT_EFFECT = {"dtype", "max_window_layers", "pretraining_tp"}
"""Keys of models that do not change a forward pass, besides those of settings.HARMLESS."""
OF_BASE = {"torch_dtype", "original_max_position_embeddings"}
"""Keys that transformers reads in any model's file, besides its base class's own."""
WITH_EFFECT = {"add_cross_attention", "is_encoder_decoder", "pruned_heads"}
"""Keys of transformers' base class that do; its others are for generation and other tasks."""


class _Sizes(msgspec.Struct):
    """The keys that give sizes and constants in all families."""

    num_hidden_layers: Layers
    hidden_size: Size
    intermediate_size: Size
    num_attention_heads: Size
    vocab_size: Size
    max_position_embeddings: Size
    rms_norm_eps: Positive | None = None
    norm_eps: Positive | None = None
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    hidden_act: str | None = None
    rope_theta: Positive | None = None
    partial_rotary_factor: Fraction | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    original_max_position_embeddings: Size | None = None
    tie_word_embeddings: bool | None = None
    sliding_window: Size | None = None
    use_sliding_window: bool | None = None
    num_experts_per_tok: Size | None = None
    layer_types: list[str] | None = None


def read_model(config: Mapping[str, Any]) -> Model:
    """Parse a `config.json`.

    Errors: CheckpointError for an architecture or a setting that is not converted.
    """
    architecture, family = _family(config)
    checked(FILE, config, _Sizes)
    config, base = completed(config, family)
    sizes = checked(FILE, config, _Sizes)
    _expect("hidden_act", sizes.hidden_act or family.activation, family.activation)
    for key, value in family.fixed.items():
        _expect(key, config.get(key, value), value)
    _expect("quantization_config", config.get("quantization_config"), None)
    _refuse_unread(config, family, base - WITH_EFFECT)
    heads, context = sizes.num_attention_heads, sizes.max_position_embeddings
    rope, max_tokens = read_rope(config, sizes, family)
    window, narrowest = _window(sizes, family)
    limits = [limit for limit in (max_tokens, narrowest) if limit is not None]
    return Model.of(
        FILE,
        architecture=architecture,
        num_layers=sizes.num_hidden_layers,
        hidden_size=sizes.hidden_size,
        ffn_hidden_size=sizes.intermediate_size,
        num_heads=heads,
        num_kv_heads=sizes.num_key_value_heads or heads,
        head_dim=sizes.head_dim or sizes.hidden_size // heads,
        vocab_size=sizes.vocab_size,
        context=context,
        norm_eps=config.get(family.norm_eps),
        rope=msgspec.to_builtins(rope),
        tied=bool(sizes.tie_word_embeddings),
        experts=_experts(config, sizes, family),
        window=window,
        max_tokens=min(limits, default=None),
    )


def _family(config: Mapping[str, Any]) -> tuple[str, Family]:
    found = config.get("architectures")
    if found is None:  # files of old versions of transformers
        kind = config.get("model_type")
        found = [name for name, family in FAMILIES.items() if family.model_type == kind] or [kind]
    names = found if isinstance(found, list) else [found]
    if len(names) != 1 or names[0] not in FAMILIES:
        reason = next((f" ({REFUSED[name]})" for name in names if name in REFUSED), "")
        raise CheckpointError(
            f"{FILE}: architectures is {found!r}{reason}; converted are {', '.join(FAMILIES)}"
        )
    family = FAMILIES[names[0]]
    _expect("model_type", config.get("model_type", family.model_type), family.model_type)
    return names[0], family


def completed(config: Mapping[str, Any], family: Family) -> tuple[dict[str, Any], set[str]]:
    """Fill in what the file leaves out, as transformers does, under its version's names.

    Returns the settings, and the keys that all models have.
    """
    from transformers import AutoConfig, PretrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    read = inspect.signature(CONFIG_MAPPING[family.model_type]).parameters
    base = set(PretrainedConfig().to_dict())
    try:
        given = to_version_4(config, lambda key: key in read or key in base or key in OF_BASE)
    except SettingsError as error:
        raise CheckpointError(f"{FILE}: {error}") from error
    given.pop("model_type", None)
    with reading(FILE, f"transformers does not read it as a {family.model_type}"):
        filled = AutoConfig.for_model(family.model_type, **given).to_dict()
    return {**filled, **given}, base


def _refuse_unread(config: Mapping[str, Any], family: Family, base: set[str]) -> None:
    known = {*_Sizes.__struct_fields__, *WITHOUT_EFFECT, *base, *family.fixed}
    known -= {"rms_norm_eps", "norm_eps"} - {family.norm_eps}
    if family.mixture is not None:
        known |= {family.mixture.number, family.mixture.ffn, family.mixture.normalized or ""}
    off = OFF | dict.fromkeys(WITH_EFFECT, (False,))  # what a decoder is without them
    unread = [
        f"{key} is {value!r}"
        for key, value in config.items()
        if key not in known
        and value not in (None, [], {}, "", *off.get(key, ()))
        and not HARMLESS.fullmatch(key)
    ]
    if unread:
        several = len(unread) > 1
        raise CheckpointError(
            f"{FILE}: {', '.join(unread)}, {'settings' if several else 'a setting'} that the "
            f"conversion of a {family.model_type} does not know; remove "
            f"{'those that do' if several else 'it if it does'} not change the model"
        )


def _window(sizes: _Sizes, family: Family) -> tuple[int | None, int | None]:
    """Return the sliding window of all layers, and the rows' limit where some have one.

    Up to the window's size, layers with one and without are the same. A window that is off, or as
    wide as the context, is none.
    """
    window, in_all = sizes.sliding_window, family.windowed
    on = in_all or bool(sizes.use_sliding_window)
    if sizes.layer_types is not None:
        kinds = _kinds(sizes, sizes.layer_types)
        # transformers gives such a family's window to all layers, whatever their types are.
        on, in_all = family.windowed or SLIDING in kinds, family.windowed and FULL not in kinds
        if SLIDING in kinds and window is None:
            raise CheckpointError(
                f"{FILE}: layer_types has {SLIDING}, but sliding_window is null; set it, or make "
                f"these layers {FULL}"
            )
    if not on or window is None or window >= sizes.max_position_embeddings:
        return None, None
    return (window, None) if in_all else (None, window)


def _kinds(sizes: _Sizes, kinds: list[str]) -> list[str]:
    """Return `layer_types`; raise CheckpointError for a kind of attention that is not converted."""
    others = sorted(set(kinds) - {FULL, SLIDING})
    if others:
        raise CheckpointError(
            f"{FILE}: layer_types has {', '.join(others)}; converted are {FULL} and {SLIDING}"
        )
    if len(kinds) != sizes.num_hidden_layers:
        raise CheckpointError(
            f"{FILE}: layer_types has {len(kinds)} layers, but num_hidden_layers is "
            f"{sizes.num_hidden_layers}; make them agree"
        )
    return kinds


def _experts(config: Mapping[str, Any], sizes: _Sizes, family: Family) -> dict[str, Any] | None:
    names = family.mixture
    if names is None:
        return None
    normalized = names.normalized is None or bool(config.get(names.normalized, False))
    values = {
        "number": config.get(names.number),
        "active": sizes.num_experts_per_tok,
        "ffn_hidden_size": config.get(names.ffn),
        "normalized": normalized,
    }
    experts = checked(FILE, values, Experts)
    if experts.active > experts.number:
        raise CheckpointError(
            f"{FILE}: num_experts_per_tok is {experts.active}, but there are {experts.number} "
            "experts"
        )
    return values


def read_rope(config: Mapping[str, Any], sizes: _Sizes, family: Family) -> tuple[Rope, int | None]:
    """Rotary position embedding, and the number of tokens up to which it is right (None: any).

    `dynamic` changes the base beyond `max_position_embeddings`, `longrope` its factors beyond
    `original_max_position_embeddings`; up to there both are constant.
    Errors: CheckpointError for an unknown kind of scaling.
    """
    settings = sizes.rope_scaling or {}
    kind = settings.get("rope_type", settings.get("type", "default"))
    fraction = sizes.partial_rotary_factor
    if family.rotary_fraction is None:
        _expect("partial_rotary_factor", fraction or 1.0, 1.0)
    values: dict[str, Any] = {
        "base": sizes.rope_theta or 10000.0,
        "fraction": fraction or family.rotary_fraction or 1.0,
    }
    limit = None
    if kind == "linear":
        values["interpolation"] = settings.get("factor")
    elif kind == "dynamic":
        limit = sizes.max_position_embeddings
    elif kind == "llama3":
        original = settings.get("original_max_position_embeddings")
        scaling = checked(
            f"{FILE}: rope_scaling", {**settings, "original_context": original}, RopeScaling
        )
        values["llama3"] = msgspec.to_builtins(scaling)
    elif kind in ("yarn", "longrope", "su"):
        values |= _frequencies(config, family, settings, values)
        if kind != "yarn":
            limit = sizes.original_max_position_embeddings or sizes.max_position_embeddings
    elif kind != "default":
        raise CheckpointError(
            f"{FILE}: rope_scaling.rope_type is {kind!r}; converted are default, linear, dynamic, "
            "yarn, longrope, llama3"
        )
    return checked(FILE, values, Rope), limit


def _frequencies(
    config: Mapping[str, Any], family: Family, settings: Mapping[str, Any], rope: Mapping[str, Any]
) -> dict[str, Any]:
    """The angles of transformers' own function, for rows within the original context."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = settings.get("rope_type", settings.get("type"))
    kind = "longrope" if kind == "su" else kind
    known = {key: value for key, value in config.items() if key not in ("model_type", "dtype")}
    known |= {"rope_scaling": dict(settings), "rope_theta": rope["base"]}
    made = AutoConfig.for_model(family.model_type, **known)
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](made, "cpu")
    if factor != 1 and rope["fraction"] != 1:
        raise CheckpointError(
            f"{FILE}: rope_scaling {kind} scales queries and keys by {factor:.4g}, but only "
            f"{rope['fraction']} of each head is rotated; Megatron scales whole heads"
        )
    return {"frequencies": tuple(frequencies.tolist()), "attention_factor": float(factor)}


def _expect(key: str, actual: Any, expected: Any) -> None:
    if actual != expected:
        raise CheckpointError(f"{FILE}: {key} is {actual!r}; only {expected!r} can be converted")
