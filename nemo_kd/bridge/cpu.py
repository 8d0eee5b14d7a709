"""Run Megatron-Bridge without CUDA: patches of its start, and settings of its models.

Call `install()` before any import of Megatron. It does nothing if CUDA is available, so an entry
point may always call it. Bridge cannot be imported without TransformerEngine, on any machine.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch

from nemo_kd.errors import NemoKDError
from nemo_kd.mcore import cpu


def install() -> bool:
    """Make Bridge run on the CPU; True when patched, False when CUDA is available.

    Errors: NemoKDError if Megatron-Bridge cannot be imported.
    """
    patched = cpu.install()
    if patched:
        _patch_start()
        _patch_scatter()
    return patched


def adapt(config: Any) -> None:
    """Set what a `ConfigContainer` needs on a CPU: layers of torch, gloo, a replicated optimizer.

    The state of torch's Adam has a step per parameter, which checkpoints of the distributed
    optimizer do not support.
    """
    config.dist.distributed_backend = "gloo"
    config.dataset.pin_memory = False
    config.ddp.use_distributed_optimizer = config.optimizer.use_distributed_optimizer = False
    adapt_model(config.model)


def adapt_model(provider: Any) -> None:
    """Set what a model provider needs on a CPU."""
    from megatron.bridge.models.gpt_provider import local_layer_spec

    provider.transformer_layer_spec = local_layer_spec
    provider.apply_rope_fusion = provider.gradient_accumulation_fusion = False


def _patch_start() -> None:
    """Let Bridge start without a GPU, and without compiling what wheels contain compiled."""
    try:
        from megatron.bridge.training import initialize, setup
    except ImportError as error:
        raise NemoKDError(
            f"Megatron-Bridge cannot be imported ({error}): use NVIDIA's container, or install "
            "megatron-bridge with its dependencies"
        ) from error
    start: Any = setup
    begin = start.initialize_megatron

    def begin_without_gpu(*args: Any, **kwargs: Any) -> Any:
        # The random states of model parallelism are only initialized where there is a device.
        with patch.object(torch.cuda, "device_count", lambda: 1):
            return begin(*args, **kwargs, allow_no_cuda=True)

    start.initialize_megatron = begin_without_gpu
    initialize.compile_helpers = lambda: None


def _patch_scatter() -> None:
    """Copy slices of weights before they are scattered: gloo sends the memory from their start.

    On a GPU they are copied to the device anyway.
    """
    from megatron.bridge.models.conversion.param_mapping import MegatronParamMapping

    mapping: Any = MegatronParamMapping
    scatter = mapping.scatter_to_tp_ranks

    def scatter_copies(self: Any, splits: Any, *args: Any, **kwargs: Any) -> Any:
        copies = [split.contiguous() for split in splits] if splits else splits
        return scatter(self, copies, *args, **kwargs)

    mapping.scatter_to_tp_ranks = scatter_copies
