"""The part of a sequence that belongs to a context-parallel rank.

Megatron cuts a sequence into 2C chunks for C ranks and gives rank r the chunks r and 2C - 1 - r, so
that causal attention costs each rank the same. Packed samples are cut one by one. A rank's
tokens, labels and loss mask are those at its positions, and the teacher's rows follow the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from nemo_kd.errors import NemoKDError


def context_parallel_positions(
    length: int, rank: int, size: int, boundaries: Sequence[int] | None = None
) -> torch.Tensor:
    """Positions of rank `rank` of `size`: [length / size] int64, ascending within each sample.

    `boundaries`: where the samples of a packed sequence begin and end, 0 and `length` included
    (`cu_seqlens`); None for a single sample.

    Errors: NemoKDError if a sample's length is not a multiple of `2 * size`.
    """
    bounds = [0, length] if boundaries is None else list(boundaries)
    parts = []
    for start, end in pairwise(bounds):
        if (end - start) % (2 * size):
            raise NemoKDError(
                f"a sequence of {end - start} tokens cannot be cut into {2 * size} equal chunks "
                f"for model.context_parallel_size={size}; pad it to a multiple"
            )
        chunks = torch.arange(start, end).view(2 * size, -1)  # [2C, chunk]
        parts += [chunks[rank], chunks[2 * size - 1 - rank]]
    return torch.cat(parts) if parts else torch.arange(0)
