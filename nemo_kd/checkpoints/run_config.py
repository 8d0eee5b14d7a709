"""The model of a Megatron-Bridge checkpoint, as Megatron-LM's arguments.

Bridge saves its configuration as `run_config.yaml` beside the weights: plain values, and objects as
mappings with their name in `_target_` (`megatron/bridge/utils/instantiate_utils.py`). Nothing is
imported or created by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from nemo_kd.checkpoints.model import CheckpointError, reading
from nemo_kd.checkpoints.nemo_settings import LLAMA3
from nemo_kd.checkpoints.source import MAX_CONFIG, Source

RUN_CONFIG = "run_config.yaml"
PROVIDER = re.compile(
    r"megatron\.bridge\.models\.[\w.]+\.(GPT|(Code)?Llama(?!4)\d*|Qwen(2|25|3|3MoE))ModelProvider\w*"
)
"""Classes of models that are Megatron-core's GPTModel and nothing else."""
LAYERS = {
    f"megatron.bridge.models.gpt_provider.{name}"
    for name in ("default_layer_spec", "local_layer_spec", "transformer_engine_layer_spec")
}
"""Functions that return Megatron-core's own layers."""
RENAMED = {
    "num_moe_experts": "num_experts",
    "seq_length": "max_position_embeddings",
    "rope_scaling": "use_rope_scaling",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
}
"""Fields of Bridge's GPTModelProvider, and Megatron-LM's names of them."""
READ_HERE = ("_target_", "activation_func", "transformer_layer_spec")
ACTIVATIONS = {
    "torch.nn.functional.silu": (True, False),
    "torch.nn.functional.gelu": (False, False),
    "torch._C._nn.gelu": (False, False),
    "megatron.core.activations.squared_relu": (False, True),
}
"""Activation → (swiglu, squared_relu); each is gated or not in Megatron-LM."""


def read_run_config(source: Source) -> dict[str, Any] | None:
    """Return the model and the tokenizer in Megatron-LM's arguments; None without the file.

    Errors: CheckpointError for a damaged file, and for a model that is not a GPTModel alone.
    """
    extent = source.files.get(RUN_CONFIG)
    if extent is None:
        return None
    name = f"{source.path}: {RUN_CONFIG}"
    with reading(name), extent.open() as file:
        config = yaml.safe_load(file.read(MAX_CONFIG))
    model = config.get("model") if isinstance(config, Mapping) else None
    if not isinstance(model, Mapping):
        raise CheckpointError(f"{name} has no block model; save the checkpoint again")
    _refuse_others(name, model)
    tokenizer = config.get("tokenizer")
    found = _settings(_rope_scaled(name, model)) | _activation(name, model)
    found |= _settings(tokenizer if isinstance(tokenizer, Mapping) else {}, "tokenizer_")
    found["group_query_attention"] = model.get("num_query_groups") is not None
    tied = model.get("share_embeddings_and_output_weights", True)
    return {**found, "untie_embeddings_and_output_weights": not tied}


def _refuse_others(name: str, model: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a model that is not, or may not be, a GPTModel alone."""
    layers = model.get("transformer_layer_spec")
    other = None
    if not PROVIDER.fullmatch(str(model.get("_target_"))):
        other = f"a {model.get('_target_')}"
    elif layers is not None and _target(layers) not in LAYERS:
        other = f"of layers of {_target(layers)}"
    if other is not None:
        raise CheckpointError(
            f"{name}: its model is {other}, which may compute more than a GPTModel; export it to "
            "Hugging Face's format with Megatron-Bridge, and dump that"
        )


def _target(value: Any) -> str:
    """Return an object's name; the whole value if it is more than that, as one with arguments."""
    if not isinstance(value, Mapping) or "_target_" not in value:
        return str(value)
    more = {key: item for key, item in value.items() if key not in ("_target_", "_call_")}
    return str(dict(value) if more or value.get("_call_") else value["_target_"])


def _settings(block: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of names with `prefix`, renamed.

    Objects stay mappings, for which no setting of a model is supported. A renamed one counts before
    one that has the name by itself, whatever the file's order.
    """
    values = {
        name: value
        for name, value in block.items()
        if name not in READ_HERE and name.startswith(prefix)
    }
    renamed = {RENAMED[name]: value for name, value in values.items() if name in RENAMED}
    return {name: value for name, value in values.items() if name not in RENAMED} | renamed


def _rope_scaled(name: str, model: Mapping[str, Any]) -> dict[str, Any]:
    """Return `model` with Llama 3.1's scaling of RoPE as later versions of Bridge have it.

    Providers of Bridge 0.1 to 0.3.0 scale the angles by their own `scale_factor` after GPTModel is
    built; with `rope_scaling`, GPTModel does it, with Megatron-core's constants.
    """
    if model.get("scale_factor") is None:
        return dict(model)
    constants = {key: value for key, value in LLAMA3.items() if key != "scale_factor"}
    for key, value in {**constants, "rope_scaling": False}.items():
        if model.get(key, value) != value:
            raise CheckpointError(
                f"{name}: {key}={model[key]!r} beside scale_factor={model['scale_factor']!r} is "
                f"not supported, only {value!r}; export the model to Hugging Face's format with "
                "Megatron-Bridge, and dump that"
            )
    others = {key: value for key, value in model.items() if key not in LLAMA3}
    return {**others, "rope_scaling": True, "rope_scaling_factor": model["scale_factor"]}


def _activation(name: str, model: Mapping[str, Any]) -> dict[str, bool]:
    activation, gated = _target(model.get("activation_func")), bool(model.get("gated_linear_unit"))
    swiglu, squared = ACTIVATIONS.get(activation, (not gated, False))
    if swiglu != gated:
        raise CheckpointError(
            f"{name}: activation_func {activation} with gated_linear_unit={gated} is not supported"
        )
    return {"swiglu": swiglu, "squared_relu": squared}
