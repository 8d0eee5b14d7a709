"""Run NeMo without CUDA: patches of NeMo, in addition to those of `nemo_kd.mcore.cpu`.

Call `install()` before any import of NeMo or Megatron. `cpu_settings` returns the changes that a
NeMo configuration needs (fusions off, plain layer specs).
"""

from __future__ import annotations

import importlib.metadata
import os
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw

from nemo_kd.mcore import cpu

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
            _register_adamw()
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


class ShardableAdamW(torch.optim.AdamW):
    """AdamW that keeps `step` in the parameter group, like apex's FusedAdam.

    torch's AdamW keeps a scalar `step` for each parameter; Megatron's sharded optimizer state
    accepts only tensors of the parameter's shape. The arithmetic is torch's `adamw`.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        both = (betas[0], betas[1])  # YAML gives a list
        super().__init__(params, lr=lr, betas=both, eps=eps, weight_decay=weight_decay)

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's needs each parameter's `step`

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        done = float(group.get("step", 0))
        adamw(
            params,
            [p.grad for p in params],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            [torch.tensor(done) for _ in params],
            foreach=False,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        group["step"] = int(done) + 1


def _register_adamw() -> None:
    from nemo.core.optim.optimizers import AVAILABLE_OPTIMIZERS

    # Registered under another name, since NeMo refuses `fused_adam` without CUDA.
    AVAILABLE_OPTIMIZERS["adamw"] = ShardableAdamW
