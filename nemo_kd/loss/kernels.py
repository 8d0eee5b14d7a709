"""Choice of the implementation of the two passes over a shard: Triton on a GPU, else torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Protocol, cast

import torch
from torch import Tensor

from nemo_kd.loss import torch_kernels
from nemo_kd.loss.rows import Rows
from nemo_kd.loss.shard import VocabShard
from nemo_kd.loss.torch_kernels import ShardPass


class Kernels(Protocol):
    """The interface of both implementations; `torch_kernels` documents it."""

    def keeps_softmax(self, dtype: torch.dtype, temperatures: Sequence[float]) -> bool: ...

    def forward(
        self,
        logits: Rows,
        ids: Tensor,
        shard: VocabShard,
        temperatures: Sequence[float],
        keep: bool = False,
    ) -> ShardPass: ...

    def backward(
        self,
        logits: Rows,
        ids: Tensor,
        shard: VocabShard,
        temperatures: Sequence[float],
        top: Tensor,
        grad_picked: Tensor | None,
        coefficients: Sequence[Tensor | None],
        out: Rows,
        softmax_kept: bool = False,
    ) -> None: ...


def choose(logits: Tensor) -> Kernels:
    """Triton's for CUDA tensors up to 32 bits where Triton is installed, else torch's."""
    if logits.is_cuda and logits.dtype != torch.float64 and _triton_is_installed():
        from nemo_kd.loss import triton_kernels

        return cast(Kernels, triton_kernels)
    return cast(Kernels, torch_kernels)


@cache
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None
