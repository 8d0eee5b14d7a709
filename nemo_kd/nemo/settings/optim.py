"""The keys of `model.optim` that NeMo and the chosen optimizer and schedule read."""

from __future__ import annotations

import importlib
import inspect
from functools import cache

from omegaconf import DictConfig

from nemo_kd.nemo.settings import sources
from nemo_kd.settings.blocks import Block, Keys
from nemo_kd.settings.values import (
    ANY,
    COUNT,
    FLAG,
    TEXT,
    Kind,
    list_of,
    number,
    one_of,
    optional,
    whole,
)

MODELS = "nemo.collections.nlp.models.language_modeling"
GPT_MODELS = tuple(
    f"{MODELS}.{name}"
    for name in ("megatron_gpt_sft_model", "megatron_gpt_model", "megatron_base_model")
)
OPTIMIZERS = "nemo.core.optim.optimizers"
SCHEDULERS = "nemo.core.optim.lr_scheduler"
FUSED_ADAM = (
    "lr bias_correction betas eps adam_w_mode weight_decay amsgrad set_grad_none capturable "
    "master_weights "
)
APEX = {
    "fused_adam": FUSED_ADAM,
    "megatron_fused_adam": FUSED_ADAM,
    "lamb": "lr bias_correction betas eps weight_decay amsgrad adam_w_mode grad_averaging "
    "set_grad_none max_grad_norm use_nvlamb",
    "distributed_fused_adam": FUSED_ADAM
    + "dtype grad_sync_dtype param_sync_dtype device process_group distributed_process_group "
    "redundant_process_group average_grad_sync overlap_grad_sync overlap_param_sync "
    "bucket_cap_mb pipeline_size contiguous_param_buffer contiguous_grad_buffer store_params "
    "store_param_remainders with_scaled_states nccl_ub",
}
"""Parameters of apex's optimizers, listed because apex is not on PyPI and may be missing."""
ADAMW = "lr betas eps weight_decay"
"""Parameters of our own `adamw`, `nemo_kd.nemo.adamw`."""
MCORE = "mcore_distributed_optim"


@cache
def optimizers() -> dict[str, str]:
    """Map the name of each optimizer to its class in NeMo's source."""
    listed = sources.named_classes(OPTIMIZERS, "AVAILABLE_OPTIMIZERS")
    return {**dict.fromkeys(APEX, ""), MCORE: "", **listed}


@cache
def optimizer_parameters(name: str) -> list[str]:
    """Return the constructor parameters of an optimizer."""
    cls = optimizers().get(name, "")
    if name in APEX:
        return APEX[name].split()
    if name == "adamw":
        return ADAMW.split()
    if module := sources.imported_from(OPTIMIZERS, cls):
        return list(sources.parameters(module, cls))
    if "." not in cls:  # Megatron's: NeMo's code names the few parameters that it passes
        return sources.keys_read(["nemo.core.classes.modelPT"], "optim_config")
    found = getattr(importlib.import_module("torch.optim"), cls.rpartition(".")[2])
    return [name for name in inspect.signature(found).parameters if name != "params"]


def optim_keys(block: DictConfig) -> Keys:
    """Return the keys of `model.optim` that its optimizer and NeMo read."""
    own = sources.keys_read(GPT_MODELS, r"self\._?cfg\.optim|optim_config")
    return dict.fromkeys([*optimizer_parameters(str(block.get("name", "adam"))), *own], ANY)


def sched_keys(block: DictConfig) -> Keys:
    """Return the keys of `model.optim.sched` that its schedule and NeMo read."""
    cls = schedulers().get(str(block.get("name")), "")
    if cls.startswith("pt_scheduler."):
        found = getattr(importlib.import_module("torch.optim.lr_scheduler"), cls.split(".")[1])
        return dict.fromkeys(inspect.signature(found).parameters, ANY)
    found = {**sources.parameters(SCHEDULERS, cls), "args": ANY, "max_steps": ANY}
    return {name: kind for name, kind in found.items() if name != "optimizer"}


@cache
def schedulers() -> dict[str, str]:
    return sources.named_classes(SCHEDULERS, "AVAILABLE_SCHEDULERS")


OPTIMIZER = Kind(
    "one of NeMo's optimizers",
    lambda value: value in optimizers() or len(optimizers()) == len(APEX) + 1,
    lambda value: one_of(*optimizers(), fused_adam="fusedadam apexadam").hint(value),
)
SCHEDULER = Kind(
    "one of NeMo's schedules",
    lambda value: not schedulers() or value in schedulers(),
    lambda value: one_of(*schedulers(), CosineAnnealing="cosine cos").hint(value),
)
SCHED = Block(
    {
        "name": SCHEDULER,
        "warmup_steps": optional(whole(0)),
        "warmup_ratio": optional(number(0, 1)),
        "constant_steps": optional(whole(0)),
        "min_lr": number(0),
        "monitor": TEXT,
        "reduce_on_plateau": FLAG,
    },
    sched_keys,
)
OPTIM = Block(
    {
        "name": OPTIMIZER,
        "lr": number(0),
        "weight_decay": number(0),
        "betas": list_of(number(0, 1), 2),
        "num_distributed_optimizer_instances": COUNT,
        "sched": SCHED,
    },
    optim_keys,
)
