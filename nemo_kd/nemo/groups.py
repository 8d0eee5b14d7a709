"""Settings of NeMo's process groups, which are made before its model is.

NeMo's model passes the same settings to `initialize_model_parallel_for_nemo`, which then changes
the sizes and ranks that Megatron reports, but not the groups: both calls have to agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig

from nemo_kd.nemo.settings.optim import MCORE
from nemo_kd.settings.batches import processes_of
from nemo_kd.teacher.layout import LayoutError

DEFAULTS: dict[str, Any] = {
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "use_tp_pp_dp_mapping": False,
    "pipeline_model_parallel_comm_backend": None,
    "use_te_rng_tracker": False,
}
"""Keys of `model` that are settled with the process groups, and their values if a job does not set
them: those of the checkpoint were of its own training."""


def group_settings(model: DictConfig) -> dict[str, Any]:
    """Return the settings that NeMo's model passes to `initialize_model_parallel_for_nemo`.

    Virtual pipelines are missing: `refuse` refuses them.
    """
    settings = {key: model.get(key, default) for key, default in DEFAULTS.items()}
    userbuffers = model.get("ub_tp_comm_overlap", False)
    by_mpi = model.get("ub_tp_comm_bootstrap_backend", "nccl") == "mpi"
    return {
        **settings,
        "tensor_model_parallel_size": model.tensor_model_parallel_size,
        "pipeline_model_parallel_size": model.pipeline_model_parallel_size,
        "num_distributed_optimizer_instances": _instances(model),
        "micro_batch_size": model.micro_batch_size,
        "global_batch_size": model.global_batch_size,
        "use_fp8": model.get("fp8", False),
        "init_mpi_proc_group": userbuffers and by_mpi,
        "seed": model.seed,
    }


def refuse_groups(cfg: DictConfig) -> None:
    """Refuse settings of process groups that NeMo or Megatron does not support.

    Errors: LayoutError.
    """
    _refuse_expert_parallelism(cfg.model)
    backend = cfg.model.get("pipeline_model_parallel_comm_backend")
    if backend is not None and not torch.cuda.is_available():
        raise LayoutError(
            f"model.pipeline_model_parallel_comm_backend={backend} does not work on a CPU; set it "
            "to null"
        )
    instances, optimizer = _instances(cfg.model), (cfg.model.get("optim") or {}).get("name")
    if instances != 1 and optimizer != MCORE:
        raise LayoutError(
            f"model.optim.num_distributed_optimizer_instances={instances} has no effect with "
            f"model.optim.name={optimizer}: set model.optim.name={MCORE}, or remove it"
        )
    world = processes_of(cfg.trainer.devices, cfg.trainer.get("num_nodes", 1))
    if world is not None:
        _check_sizes(cfg.model, world)


def _refuse_expert_parallelism(model: DictConfig) -> None:
    experts = model.get("expert_model_parallel_size", 1)
    if experts == 1:
        return
    where = f"model.expert_model_parallel_size={experts}"
    if not model.get("megatron_amp_O2"):
        raise LayoutError(f"{where}: NeMo requires model.megatron_amp_O2=true for it; set both")
    if (model.get("optim") or {}).get("name") == "distributed_fused_adam":
        raise LayoutError(
            f"{where} does not work with model.optim.name=distributed_fused_adam; set "
            f"model.optim.name={MCORE}"
        )
    if model.get("use_tp_pp_dp_mapping") and model.pipeline_model_parallel_size > 1:
        raise LayoutError(
            f"{where} with model.use_tp_pp_dp_mapping=true does not work over pipeline stages: "
            "Megatron orders the ranks of experts otherwise; set "
            "model.use_tp_pp_dp_mapping=false"
        )


def _check_sizes(model: DictConfig, world: int) -> None:
    """Check that the sizes divide the ranks that they share out.

    Errors: LayoutError.
    """
    tensor, stages = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    experts, instances = model.get("expert_model_parallel_size", 1), _instances(model)
    if experts > 1 and world % (tensor * stages * experts):
        raise LayoutError(
            f"{world} processes cannot hold tensor × pipeline × expert parallel size "
            f"{tensor * stages * experts}: start a multiple of it, or lower "
            f"model.expert_model_parallel_size={experts}"
        )
    replicas = world // (tensor * stages * experts)
    if replicas % instances:
        raise LayoutError(
            f"model.optim.num_distributed_optimizer_instances={instances} does not divide the "
            f"{replicas} ranks that hold the same weights; set it to 1 or a divisor of {replicas}"
        )


def _instances(model: DictConfig) -> int:
    optim: Mapping[str, Any] = model.get("optim") or {}
    return int(optim.get("num_distributed_optimizer_instances", 1))
