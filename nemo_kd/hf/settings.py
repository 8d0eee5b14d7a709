"""The configuration of a Hugging Face directory, with every setting of its file.

A configuration of transformers takes any key, and a key that its class does not know has no effect.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from nemo_kd.checkpoints.settings import HARMLESS, OFF, SettingsError, to_version_4
from nemo_kd.checkpoints.windows import first_with_window, fix_windows
from nemo_kd.errors import NemoKDError

OF_ALL_MODELS = {
    *re.findall(r'kwargs\.(?:pop|get)\(\s*"(\w+)"', inspect.getsource(PretrainedConfig.__init__)),
    *PretrainedConfig._get_global_generation_defaults(),
    *("model_type", "quantization_config", "original_max_position_embeddings"),
}
"""Keys that transformers reads in the configuration of any model."""


class ConfigError(NemoKDError):
    """Error for a `config.json` with a setting that would have no effect."""


def read_config(directory: Path) -> PretrainedConfig:
    """Return the configuration of a directory; raise ConfigError if a setting had no effect.

    Files of transformers 5 are translated. Errors of transformers pass through.
    """
    settings, _ = PretrainedConfig.get_config_dict(str(directory), local_files_only=True)
    kind = settings.get("model_type")
    if kind in CONFIG_MAPPING:
        found = CONFIG_MAPPING[kind]
    else:  # an error of transformers, or the model type in the directory's name
        found = type(
            AutoConfig.from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=False
            )
        )
    try:
        settings = _translated(settings, found)
        config: PretrainedConfig = found.from_dict(settings)
        _check(settings, config)
        fix_windows(config.get_text_config())
    except SettingsError as error:
        raise ConfigError(f"{directory}/config.json: {error}{_remedy(settings)}") from error
    return config


def _remedy(settings: Mapping[str, Any]) -> str:
    written, read = str(settings.get("transformers_version")), transformers.__version__
    newer = _version(written) > _version(read)
    install = f"install transformers {written}, which wrote it, or " if newer else ""
    return (
        f". This is transformers {read}: {install}remove the setting if the logits do not depend "
        "on it"
    )


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])


def _translated(settings: Mapping[str, Any], found: Any) -> dict[str, Any]:
    """Translate the settings and those of the configurations inside."""
    new = to_version_4(settings, lambda key: _reads(found, key))
    for key, part in (found.sub_configs or {}).items():
        value = new.get(key)
        if isinstance(value, Mapping):
            kind = value.get("model_type")
            if kind in CONFIG_MAPPING:
                part = CONFIG_MAPPING[kind]
            if isinstance(part, type) and part is not AutoConfig:
                new[key] = _translated(value, part)
    return new


def _check(settings: Mapping[str, Any], config: PretrainedConfig) -> None:
    unread = [f"{key}={_short(value)}" for key, value in _unread(settings, config)]
    kind = type(config).__name__
    if len(unread) == 1:
        raise SettingsError(f"{unread[0]} is not a setting of {kind} and would have no effect")
    if unread:
        raise SettingsError(
            f"{', '.join(unread)} are not settings of {kind} and would have no effect"
        )


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) < 100 else f"{text[:100]}..."


def _unread(settings: Mapping[str, Any], config: PretrainedConfig) -> Iterator[tuple[str, Any]]:
    """Yield the settings that have no effect on `config`, and might have one on the logits."""
    found: Any = type(config)
    for key, value in settings.items():
        inner = getattr(config, key, None)
        if isinstance(inner, PretrainedConfig) and isinstance(value, Mapping):
            yield from _unread(value, inner)
        elif not (
            _reads(found, key)
            or _means_nothing(key, value)
            or (key == "layer_types" and value == layer_types(config))
            or (key in _made(found) and inner == value)
        ):
            yield key, value


def _means_nothing(key: str, value: Any) -> bool:
    return value is None or bool(HARMLESS.fullmatch(key)) or value in OFF.get(key, ())


@cache
def _reads(found: Any, key: str) -> bool:
    """Whether the class takes a key: in a signature, under another name, or in its model's code."""
    if key in OF_ALL_MODELS or key in found.attribute_map:
        return True
    own = [one for one in found.__mro__ if issubclass(one, PretrainedConfig)]
    own.remove(PretrainedConfig)
    if any("__init__" in vars(one) and key in _parameters(one) for one in own):
        return True
    return bool(re.search(rf"config\.{re.escape(key)}\b|[\"']{re.escape(key)}[\"']", _code(found)))


def _parameters(found: Any) -> Mapping[str, Any]:
    return inspect.signature(found.__init__).parameters


@cache
def _code(found: Any) -> str:
    """Return the source of the modules of a configuration and of its models."""
    modules = [
        one.__module__
        for one in found.__mro__
        if issubclass(one, PretrainedConfig) and one is not PretrainedConfig
    ]
    text = ""
    for name in dict.fromkeys(modules):
        text += inspect.getsource(import_module(name))
        model = name.replace(".configuration_", ".modeling_")
        spec = Path(str(import_module(name).__file__)).with_name(f"{model.rpartition('.')[2]}.py")
        text += spec.read_text(encoding="utf-8") if spec.is_file() else ""
    return text


@cache
def _made(found: Any) -> frozenset[str]:
    """Return the attributes that the class sets itself."""
    try:
        return frozenset(vars(found()))
    except (TypeError, ValueError):  # a class without defaults
        return frozenset()


def layer_types(config: PretrainedConfig) -> list[str]:
    """Return what transformers 4.51 does in each layer, in the words of transformers 5."""
    window, kind = getattr(config, "sliding_window", None), config.model_type
    layers = range(config.num_hidden_layers)
    if kind == "gemma2":
        slides = [layer % 2 == 0 for layer in layers]
    elif kind in ("gemma3_text", "cohere2"):
        slides = [(layer + 1) % config.sliding_window_pattern != 0 for layer in layers]
    elif hasattr(config, "max_window_layers"):  # Qwen's; see `fix_windows`
        first = first_with_window(config)
        slides = [bool(config.use_sliding_window) and layer >= first for layer in layers]
    else:
        slides = [window is not None] * len(layers)
    return ["sliding_attention" if one else "full_attention" for one in slides]


def attention(config: PretrainedConfig) -> str | None:
    """Return the implementation of attention that computes with all settings; None: the default.

    With PyTorch's own, transformers 4.51 leaves out these settings, or computes them in other ways.
    """
    text = config.get_text_config()
    eager = getattr(text, "attn_logit_softcapping", None) is not None  # Gemma 2
    eager |= bool(getattr(text, "scale_attn_by_inverse_layer_idx", False))  # GPT-2
    eager |= not getattr(text, "scale_attn_weights", True)
    eager |= text.model_type == "falcon" and bool(text.alibi)
    return "eager" if eager else None
