"""The positions of a sequence that this context-parallel rank has."""

from __future__ import annotations

import torch
from megatron.core import parallel_state

from nemo_kd.data import context_parallel_positions


def own_positions(length: int) -> torch.Tensor | None:
    """[length / C] on the CPU: this context-parallel rank's positions of a sequence; None: all."""
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return None
    rank = parallel_state.get_context_parallel_rank()
    return context_parallel_positions(length, rank, size)
