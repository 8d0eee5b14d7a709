"""Train on stores in Megatron-Bridge, and dump teachers that it loads.

The names are imported at their first use: on a machine without CUDA, `nemo_kd.bridge.cpu.install()`
must be called before any import of Megatron.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MODULES = {
    "KDDataConfig": "data",
    "KDForwardStep": "step",
    "KDSource": "data",
    "export_merged": "peft",
    "finetune": "training",
    "finetune_config": "recipe",
    "load_teacher": "teacher",
}

__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"nemo_kd.bridge.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
