"""The positions of a sequence that this context-parallel rank has."""

from __future__ import annotations

import torch
from megatron.core import parallel_state

from nemo_kd.data import context_parallel_positions


def own_positions(length: int) -> torch.Tensor | None:
    """[length / C]: the positions of a sequence that this context-parallel rank has; None: all."""
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return None
    rank = parallel_state.get_context_parallel_rank()
    return context_parallel_positions(length, rank, size).to(torch.cuda.current_device())
