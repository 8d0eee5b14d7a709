"""Dump teachers and train students with Megatron-core, without NeMo.

`StoreBatches` and `kd_forward_step` are imported at their first use: on a machine without CUDA,
`nemo_kd.mcore.cpu.install()` must be called before any import of Megatron.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["StoreBatches", "kd_forward_step"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("nemo_kd.mcore.training"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
