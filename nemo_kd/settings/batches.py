"""Check that the parallel sizes divide the processes, and micro-batches the global batch."""

from __future__ import annotations

import math
import os

from omegaconf import DictConfig

from nemo_kd.errors import NemoKDError

SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")


def processes_of(devices: object, num_nodes: int = 1) -> int | None:
    """Return the number of processes of a job; None unless `trainer.devices` is a number."""
    if not isinstance(devices, str | int) or not str(devices).isdigit() or not int(devices):
        return None
    return int(devices) * num_nodes


def data_parallel_size(cfg: DictConfig) -> int | None:
    """Return the number of replicas of the model; None unless `trainer.devices` is a number.

    Errors: NemoKDError if the model-parallel sizes do not divide the number of processes.
    """
    world = processes_of(cfg.trainer.devices, cfg.trainer.get("num_nodes", 1))
    if world is None:
        return None
    model = math.prod(cfg.model.get(name, 1) for name in SIZES)
    if world % model:
        raise NemoKDError(
            f"{world} processes cannot hold tensor × pipeline × context parallel size {model}; "
            f"start a multiple of {model} (torchrun --nproc_per_node) or lower "
            "model.tensor_model_parallel_size / model.pipeline_model_parallel_size"
        )
    return world // model


def check_processes(cfg: DictConfig) -> None:
    """Check that `trainer.devices` equals the number of processes started on this node.

    Errors: NemoKDError if it does not.
    """
    started, devices = os.environ.get("LOCAL_WORLD_SIZE"), cfg.trainer.devices
    if started and str(devices).isdigit() and int(devices) != int(started):
        raise NemoKDError(
            f"trainer.devices={devices}, but torchrun started {started} processes on this node; "
            f"set trainer.devices={started}, or leave it out to follow torchrun"
        )


def check_batches(cfg: DictConfig, splits: tuple[str, ...]) -> None:
    """Check that micro-batch size times replicas divides the global batch of each split.

    Errors: NemoKDError if it does not.
    """
    replicas = data_parallel_size(cfg)
    if replicas is None:
        return
    blocks = {"model": cfg.model}
    for split in splits:
        blocks[f"model.data.{split}"] = cfg.model.data.get(split) or {}
    for where, block in blocks.items():
        batch, micro = block.get("global_batch_size"), block.get("micro_batch_size")
        if batch is None or micro is None or batch % (micro * replicas) == 0:
            continue
        step = micro * replicas
        fitting = sorted({max(batch // step, 1) * step, (batch // step + 1) * step})
        raise NemoKDError(
            f"{where}.global_batch_size={batch} is not a multiple of "
            f"{where}.micro_batch_size={micro} "
            f"× {replicas} data-parallel replicas = {step}; set it to "
            f"{' or '.join(map(str, fitting))}, or change {where}.micro_batch_size"
        )
