"""Dump teachers and train students with Megatron-core, without NeMo.

The names are imported at their first use: on a machine without CUDA,
`nemo_kd.mcore.cpu.install()` must be called before any import of Megatron.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MODULES = {
    "EvaluationBatches": "batches",
    "KDBatches": "batches",
    "KDDataset": "dataset",
    "MetricSums": "metrics",
    "Source": "mix",
    "StepLoss": "training",
    "StoreBatches": "batches",
    "kd_forward_step": "training",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"nemo_kd.mcore.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
