"""The number format of a teacher's computation, by `trainer.precision`."""

from __future__ import annotations

import torch

from nemo_kd.teacher.config import DumpConfig

DTYPES = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}


def dtype_of(config: DumpConfig) -> torch.dtype:
    """Return the dtype of the computation: `bf16-mixed` computes as `bf16` does."""
    return DTYPES[config.trainer.dtype_name]
