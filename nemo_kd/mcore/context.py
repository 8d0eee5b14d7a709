"""Positions of a sequence that belong to this context-parallel rank."""

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
