"""Apply restored adapters with the settings of their own training.

NeMo builds the adapters of `model.peft.restore_from_path` from the command's settings. Another
`alpha` would load without a message and scale the adapters wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_kd.checkpoints.distributed import files_of
from nemo_kd.checkpoints.model import CheckpointError
from nemo_kd.checkpoints.source import WEIGHTS, open_source
from nemo_kd.errors import NemoKDError
from nemo_kd.nemo.record import read
from nemo_kd.visible import say

PATH = "model.peft.restore_from_path"
SHAPE = {"layer_selection": None, "weight_tying": False, "position_embedding_strategy": None}
DEFAULTS: dict[str, dict[str, Any]] = {
    "lora_tuning": {
        "variant": "nemo",
        "target_modules": ["attention_qkv"],
        "adapter_dim": 32,
        "alpha": None,
        "a2a_experimental": False,
        **SHAPE,
    },
    "adapter_tuning": {
        "type": "parallel_adapter",
        "adapter_dim": 32,
        "norm_position": "pre",
        "norm_type": "layernorm",
        **SHAPE,
    },
    "ia3_tuning": {"layer_selection": None},
}
"""Block → the settings that decide what adapters compute, with the defaults of the YAML. The
default of alpha is adapter_dim."""
BLOCKS = {"lora": "lora_tuning", "adapter": "adapter_tuning", "ia3": "ia3_tuning"}
MODULES = {
    "attention": ("attention_qkv", "attention_dense"),
    "mlp": ("mlp_fc1", "mlp_fc2"),
    "all": ("attention_qkv", "attention_dense", "mlp_fc1", "mlp_fc2"),
}


def settle_adapters(cfg: DictConfig, schemes: list[str]) -> None:
    """Set `model.peft` to what the adapters of `restore_from_path` record; print the changes.

    `schemes`: those of the command.

    Errors: NemoKDError for another scheme, for a setting of the command that is neither the
    default nor the recorded value, and for adapters instead of a model.
    """
    refuse_adapters_only(str(cfg.model.restore_from_path))
    path = cfg.model.peft.restore_from_path
    if not path:
        return
    recorded = _recorded(str(path))
    _check_scheme(str(path), schemes, recorded)
    if recorded is None:
        say(f"{path} does not record its adapters' settings: those of the command are used")
        return
    changed = []
    for block in (BLOCKS[scheme] for scheme in schemes):
        given = _settings(block, cfg.model.peft.get(block) or {})
        trained = _settings(block, recorded.get(block) or {})
        for key, value in _changes(block, given, trained, str(path)).items():
            OmegaConf.update(cfg, f"model.peft.{block}.{key}", value, force_add=True)
            changed.append(f"model.peft.{block}.{key}={value}")
    if changed:
        say(f"with the settings that {path} records: {', '.join(changed)}")


def refuse_adapters_only(path: str) -> None:
    """Refuse a `.nemo` of adapters as a model: NeMo would list all weights that it lacks.

    Errors: NemoKDError.
    """
    try:
        # Names first: reading the index of a large model's weights takes seconds.
        if not Path(path).exists() or files_of(Path(path), WEIGHTS):
            return
        source = open_source(path)
    except CheckpointError:
        return  # not a format of today: NeMo may read it, or says what it is
    if source.weights is None:
        raise NemoKDError(
            f"model.restore_from_path={path} holds adapters only: merge it with the model of its "
            f"training by examples/merge_lora.py, or give it as {PATH} of a student, with that "
            "model as model.restore_from_path"
        )


def _recorded(path: str) -> Mapping[str, Any] | None:
    """Return the block `peft` of a `.nemo` or of a training's checkpoint; None if it has none."""
    if path.endswith(".ckpt"):
        settings = read(path)[1].settings
        return None if settings is None else settings["model"].get("peft")
    peft = (open_source(Path(path)).section or {}).get("peft")
    if not isinstance(peft, dict) or peft.get("peft_scheme") in (None, "none"):
        raise NemoKDError(
            f"{PATH}={path} holds no adapters: expected the .nemo of a training with "
            "model.peft.peft_scheme; a complete model belongs in model.restore_from_path"
        )
    return peft


def _check_scheme(path: str, schemes: list[str], recorded: Mapping[str, Any] | None) -> None:
    scheme = "the scheme of their training" if recorded is None else recorded["peft_scheme"]
    if not schemes:
        raise NemoKDError(
            f"{PATH}={path} has no effect with model.peft.peft_scheme=none: set "
            f"model.peft.peft_scheme={scheme}, or {PATH}=null to use no adapters"
        )
    if recorded is not None and schemes != [name for name in str(scheme).split(",") if name]:
        raise NemoKDError(
            f"model.peft.peft_scheme={','.join(schemes)}, but the adapters in {path} are {scheme}: "
            f"set model.peft.peft_scheme={scheme}"
        )


def _changes(
    block: str, given: Mapping[str, Any], trained: Mapping[str, Any], path: str
) -> dict[str, Any]:
    """Return the recorded settings that replace those given, each of which is at its default."""
    defaults = DEFAULTS[block] | {"alpha": given.get("adapter_dim")}
    found = {key: then for key, then in trained.items() if not _same(given[key], then)}
    for key, then in found.items():
        if not _same(given[key], defaults[key]):
            raise NemoKDError(
                f"model.peft.{block}.{key}={given[key]}, but the adapters in {path} were trained "
                f"with {then}: remove the setting from the command, which then uses the recorded "
                f"value, or set {then}"
            )
    if "adapter_dim" in found and "alpha" in trained:
        found["alpha"] = trained["alpha"]  # the command's may be a reference to adapter_dim
    return found


def _settings(block: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of DEFAULTS in a block, complete."""
    complete = {
        key: default if values.get(key) is None else values[key]
        for key, default in DEFAULTS[block].items()
    }
    if "alpha" in complete and complete["alpha"] is None:
        complete["alpha"] = complete["adapter_dim"]
    return {key: list(x) if OmegaConf.is_list(x) else x for key, x in complete.items()}


def _same(one: Any, other: Any) -> bool:
    return _plain(one) == _plain(other)


def _plain(value: Any) -> Any:
    """Return equal values for settings that mean the same."""
    if value == "mixedfusedlayernorm":  # apex's, which a CPU replaces
        return "layernorm"
    if not isinstance(value, list):
        return value
    return sorted({part for item in value for part in MODULES.get(str(item), (item,))})
