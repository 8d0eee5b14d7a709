"""The processes of a job started by torchrun or SLURM: rank, process group, one rank's output."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from nemo_kd.teacher.layout import Layout, LayoutError

LONGEST_WAIT = timedelta(days=7)
"""Timeout of collectives. It is long because one rank may finish its shards long before another;
the launcher detects dead ranks."""


@dataclass(frozen=True)
class Launch:
    """Rank, number of processes and rendezvous address, as given by the launcher."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Rank among the processes of this node."""

    address: str = "env://"
    """Rendezvous address of the process group, for `init_process_group`."""

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Launch:
        """Read torchrun's variables, else those of a SLURM step, else assume a single process."""
        if "RANK" in environ and "WORLD_SIZE" in environ:
            local = int(environ.get("LOCAL_RANK", 0))
            return cls(int(environ["RANK"]), int(environ["WORLD_SIZE"]), local)
        size = int(environ.get("SLURM_STEP_NUM_TASKS", 1))
        if size == 1:
            return cls()
        host = environ.get("MASTER_ADDR") or first_host(environ["SLURM_STEP_NODELIST"])
        # Derive the port from the job id, so that jobs on the same node use different ports.
        port = environ.get("MASTER_PORT") or 15000 + int(environ["SLURM_JOB_ID"]) % 10000
        rank, local = int(environ["SLURM_PROCID"]), int(environ["SLURM_LOCALID"])
        return cls(rank, size, local, f"tcp://{host}:{port}")


def say_once(lines: Iterable[str]) -> None:
    """Print lines to stderr on rank 0: the launcher's, before there is a process group."""
    rank = dist.get_rank() if dist.is_initialized() else Launch.of(os.environ).rank
    Layout(rank=rank).say_each(lines)


def first_host(nodes: str) -> str:
    """Return the first host in a SLURM node list: `n7` for `n[7-9,12],m1`."""
    found = re.match(r"([^,\[]+)(?:\[([^,\-\]]+)[^\]]*\]([^,\[]*))?", nodes)
    if found is None:
        raise LayoutError(f"SLURM_STEP_NODELIST={nodes!r} names no node; set MASTER_ADDR")
    return "".join(part or "" for part in found.groups())


def start(launch: Launch, *, expected: int | None, accelerator: str = "gpu") -> Layout:
    """Initialise the process group, NCCL on GPUs or gloo on CPUs, and return this rank's layout.

    A single process needs no process group; an existing process group is reused.

    Raises LayoutError if the number of processes is not `expected`; None accepts any number.
    """
    on_cpu = accelerator == "cpu" or not torch.cuda.is_available()
    device = torch.device("cpu")
    if not on_cpu:
        # Modulo, because SLURM may make only its own GPU visible to each process.
        device = torch.device("cuda", launch.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        if expected not in (None, launch.size):
            raise LayoutError(_wrong_number(expected, launch.size))
        if launch.size == 1:
            return Layout(device=device)
        dist.init_process_group(
            "gloo" if on_cpu else "nccl",
            init_method=launch.address,
            rank=launch.rank,
            world_size=launch.size,
            timeout=LONGEST_WAIT,
        )
    rank, size = dist.get_rank(), dist.get_world_size()
    return Layout(rank=rank, size=size, replica=rank, replicas=size, device=device)


def _wrong_number(expected: int | None, started: int) -> str:
    asked = f"trainer.devices × trainer.num_nodes is {expected}"
    if started == 1:
        return (
            f"{asked}, but one process was started: start this kind of teacher with torchrun "
            "--nproc_per_node=DEVICES (or srun), one process for each device"
        )
    return (
        f"{asked}, but {started} processes were started: set trainer.devices to the processes on "
        "each node and trainer.num_nodes to the number of nodes"
    )
