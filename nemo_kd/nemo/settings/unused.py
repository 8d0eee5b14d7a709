"""Settings of what is switched off: given, and without an effect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

_BOTH: dict[str, Any] = {
    **{"adapter_dim": 32, "adapter_dropout": 0.0, "column_init_method": "xavier"},
    **{"row_init_method": "zero", "layer_selection": None, "weight_tying": False},
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "model.peft.lora_tuning": {
        **_BOTH,
        "variant": "nemo",
        "target_modules": ["attention_qkv"],
        "alpha": 32,
    },
    "model.peft.ia3_tuning": {"layer_selection": None},
    "model.peft.adapter_tuning": {
        **_BOTH,
        **{"type": "parallel_adapter", "norm_position": "pre", "norm_type": "layernorm"},
    },
    "exp_manager.early_stopping_callback_params": {
        **{"monitor": "val_loss", "mode": "min", "min_delta": 0.001, "patience": 10},
        "strict": False,
    },
    "exp_manager.ema": {},
}
"""The blocks of the YAML, which NeMo's own files have too, with their defaults."""


def unused(cfg: DictConfig) -> list[str]:
    """Return a line for each block that has other values than the default's, but is not used."""
    peft = cfg.model.peft.get("peft_scheme")
    off = {
        f"model.peft.{scheme}_tuning": "model.peft.peft_scheme=none trains all weights"
        for scheme in ("lora", "ia3", "adapter")
        if peft in (None, "none")
    }
    manager = cfg.get("exp_manager") or {}
    if not manager.get("create_early_stopping_callback"):
        block = "exp_manager.early_stopping_callback_params"
        off[block] = "set exp_manager.create_early_stopping_callback=true"
    if not (manager.get("ema") or {}).get("enable"):
        off["exp_manager.ema"] = "set exp_manager.ema.enable=true"
    lines = []
    for block, why in off.items():
        if changed := list(_changed(OmegaConf.select(cfg, block), DEFAULTS[block])):
            named = ", ".join(f"{block}.{key}={value}" for key, value in changed)
            lines.append(f"{named} without effect: {why}")
    return lines


def _changed(block: Any, defaults: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    found = OmegaConf.to_container(block, resolve=True) if OmegaConf.is_dict(block) else {}
    assert isinstance(found, dict)
    follows = {"alpha": found.get("adapter_dim")}  # as the YAML computes it
    for key, value in ((str(key), value) for key, value in found.items()):
        off = value is None or value is False  # such as `enable: false`
        if not off and value not in (defaults.get(key), follows.get(key)):
            yield key, value
