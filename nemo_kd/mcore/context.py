"""What of a sequence belongs to this process, by its context-parallel and pipeline rank."""

from __future__ import annotations

import torch
from megatron.core import parallel_state

from nemo_kd.data import context_parallel_positions


def own_positions(length: int) -> torch.Tensor | None:
    """Return this context-parallel rank's positions of a sequence, [length / C] on the CPU.

    None without context parallelism, and before the process groups start: all positions.
    """
    size = parallel_state.get_context_parallel_world_size()
    if size <= 1:
        return None
    rank = parallel_state.get_context_parallel_rank()
    return context_parallel_positions(length, rank, size)


def on_last_stage() -> bool:
    """Return whether this process has the last pipeline stage, which computes the loss."""
    last = parallel_state.get_pipeline_model_parallel_world_size() - 1
    return int(parallel_state.get_pipeline_model_parallel_rank()) == last
