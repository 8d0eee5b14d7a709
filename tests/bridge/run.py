"""Run a program as the main one where Megatron-Bridge finds a stub of TransformerEngine.

    python -m tests.bridge.run examples/bridge/train.py student/ …

Bridge's adapters read a few names of TransformerEngine at import, and its CPU models use none.
"""

from __future__ import annotations

import runpy
import sys
import warnings
from importlib.metadata import version
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from nemo_kd.mcore import cpu


def stub() -> None:
    """Import Bridge on a CPU, with a stub that Megatron-core does not use."""
    # Megatron-core 0.19 reads an attribute that the last release on PyPI does not have.
    import nvidia_resiliency_ext as nvrx

    nvrx.__version__ = version("nvidia-resiliency-ext")
    cpu.install()
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.models.gpt.gpt_model

    package: Any = ModuleType("transformer_engine")
    package.__version__ = "0.0.0"  # older than all that Megatron-core would use
    package.pytorch = ModuleType("transformer_engine.pytorch")
    for name in ("Linear", "LayerNormLinear"):
        setattr(package.pytorch, name, type(name, (torch.nn.Linear,), {}))
    package.pytorch.ops = SimpleNamespace(Sequential=torch.nn.Sequential)
    stubs = {module.__name__: module for module in (package, package.pytorch)}
    sys.modules.update(stubs)
    import megatron.bridge  # noqa: F401

    for name in stubs:
        del sys.modules[name]


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    stub()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
