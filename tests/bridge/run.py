"""Run a program as the main one where Megatron-Bridge finds stubs of what it imports.

    python tests/bridge/run.py examples/bridge/train.py student/ …

Bridge reads a few names of TransformerEngine and of NVIDIA's resiliency extension at import, and
uses none of them for a model of Megatron-core's own layers.
"""

from __future__ import annotations

import runpy
import sys
import warnings
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from nemo_kd.mcore import cpu


def import_bridge() -> None:
    """Import Bridge on a CPU; Megatron-core is imported first, and finds no stub."""
    cpu.install()
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.models.gpt.gpt_model

    stubs = {module.__name__: module for module in (*transformer_engine(), *resiliency())}
    sys.modules.update(stubs)
    import megatron.bridge
    import megatron.bridge.peft.utils
    import megatron.bridge.training.pretrain

    assert megatron.bridge.training.pretrain
    # Bridge takes Megatron-core's names of TransformerEngine's layers, which are None, for layers.
    megatron.bridge.peft.utils.HAVE_TE = False
    for name in stubs:
        del sys.modules[name]


def transformer_engine() -> list[ModuleType]:
    """The classes that Bridge's adapters derive from, or compare with."""
    package: Any = ModuleType("transformer_engine")
    package.__version__ = "0.0.0"  # older than all that Megatron-core would use
    package.pytorch = ModuleType("transformer_engine.pytorch")
    for name in ("Linear", "LayerNormLinear"):
        setattr(package.pytorch, name, type(name, (torch.nn.Linear,), {}))
    package.pytorch.ops = SimpleNamespace(Sequential=torch.nn.Sequential)
    return [package, package.pytorch]


def resiliency() -> list[ModuleType]:
    """The annotation of a parameter."""
    package: Any = ModuleType("nvidia_resiliency_ext")
    package.inprocess = ModuleType("nvidia_resiliency_ext.inprocess")
    package.inprocess.CallWrapper = object
    return [package, package.inprocess]


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    import_bridge()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
