"""Run NeMo without CUDA: patches of NeMo, in addition to those of `nemo_kd.mcore.cpu`.

Call `install()` before any import of NeMo or Megatron. `cpu_settings` returns the changes that a
NeMo configuration needs (fusions off, plain layer specs).
"""

from __future__ import annotations

import importlib.metadata
import os
import types
from typing import Any

import torch

from nemo_kd.mcore import cpu
from nemo_kd.nemo.adamw import register_adamw

_state = types.SimpleNamespace(patched=False)


def install() -> bool:
    """Make NeMo run on the CPU; True when patched, False when CUDA is available."""
    # NeMo reads the container's version from the environment and fails without one.
    if not torch.cuda.is_available():
        os.environ.setdefault("NVIDIA_PYTORCH_VERSION", "25.07")
    on_cpu = cpu.install()
    if on_cpu and not _state.patched:
        _state.patched = True
        with cpu.without_apex_warnings():
            _patch_nemo()
            _patch_nemo_apex()
            register_adamw()
    return on_cpu


def cpu_settings(precision: str | int = 32) -> dict[str, Any]:
    """Return the overrides (dotted key → value) that a NeMo training needs on a CPU."""
    off = (
        "transformer_engine",
        "persist_layer_norm",
        "masked_softmax_fusion",
        "bias_activation_fusion",
        "bias_dropout_add_fusion",
        "apply_rope_fusion",
        "gradient_accumulation_fusion",
        "gradient_as_bucket_view",
    )
    settings: dict[str, Any] = {f"model.{key}": False for key in off}
    settings["model.use_cpu_initialization"] = True
    settings["model.precision"] = settings["trainer.precision"] = precision
    settings["trainer.accelerator"] = "cpu"
    for split in ("train_ds", "validation_ds", "test_ds"):
        settings[f"model.data.{split}.pin_memory"] = False
    return settings


def _patch_nemo() -> None:
    """Replace TransformerEngine with Megatron-core's own torch modules."""
    # NeMo looks up TransformerEngine's version for adapters under sequence parallelism.
    version = importlib.metadata.version

    def version_of(distribution_name: str) -> str:
        te_names = ("transformer-engine", "transformer_engine")
        return "0.0" if distribution_name in te_names else version(distribution_name)

    importlib.metadata.version = version_of

    import nemo.collections.nlp.models.language_modeling.megatron_gpt_model as gpt

    from nemo_kd.mcore.cpu import local_layer_spec

    def get_specs(spec_name: str, transformer_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        return local_layer_spec(transformer_config)

    gpt.get_specs = get_specs


def _patch_nemo_apex() -> None:
    """Replace apex with torch and Megatron-core."""
    import nemo.collections.nlp.modules.common.megatron.build_model as build_model
    import nemo.collections.nlp.modules.common.megatron.clip_grads as clip_grads
    import nemo.collections.nlp.modules.common.megatron.utils as utils
    import nemo.collections.nlp.parts.nlp_overrides as overrides
    from megatron.core.tensor_parallel.layers import (
        set_defaults_if_not_set_tensor_model_parallel_attributes as set_defaults,
    )
    from megatron.core.utils import (
        local_multi_tensor_applier,
        local_multi_tensor_l2_norm,
        local_multi_tensor_scale,
    )
    from nemo.core.optim.mcore_optim import McoreDistributedOptimizer

    overrides.HAVE_APEX = clip_grads.HAVE_APEX = True
    overrides.McoreDistributedOptimizer = McoreDistributedOptimizer
    # A class of apex, used only in isinstance checks.
    overrides.MegatronDistributedFusedAdam = type("MegatronDistributedFusedAdam", (), {})
    build_model.set_defaults_if_not_set_tensor_model_parallel_attributes = set_defaults
    utils.listify_model = lambda model: model if isinstance(model, list) else [model]
    for name in ("MixedFusedRMSNorm", "FusedLayerNorm", "FastLayerNorm"):
        setattr(utils, name, type(name, (torch.nn.Module,), {}))
    clip_grads.multi_tensor_applier = local_multi_tensor_applier
    clip_grads.amp_C = types.SimpleNamespace(
        multi_tensor_l2norm=local_multi_tensor_l2_norm, multi_tensor_scale=local_multi_tensor_scale
    )
