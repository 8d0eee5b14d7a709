"""`pretrain_gpt_kd.py` from weights that no layout changes, those of `tests/layouts/interleaved.py`.

    torchrun … tests/megatron_lm/drawn.py OPTIONS
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

from tests.layouts.interleaved import draw

EXAMPLE = Path(__file__).parent.parent.parent / "examples/megatron_lm/pretrain_gpt_kd.py"


def main() -> None:
    spec = importlib.util.spec_from_file_location("pretrain_gpt_kd", EXAMPLE)
    assert spec and spec.loader
    example: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.cpu.install_megatron_lm()
    from megatron.training import get_args, training

    setup = training.setup_model_and_optimizer

    def setup_model_and_optimizer(*arguments: Any, **keywords: Any) -> Any:
        model, *others = setup(*arguments, **keywords)
        if get_args().iteration == 0:  # not from a checkpoint
            for part in model:
                draw_shards(part.module)
        return model, *others

    training.setup_model_and_optimizer = setup_model_and_optimizer
    with example.reported():
        example.main()


@torch.no_grad()
def draw_shards(gpt: Any) -> None:
    """Draw whole parameters and keep this tensor-parallel rank's part of each."""
    from megatron.core import parallel_state

    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    shards = dict(gpt.named_parameters())
    for parameter in shards.values():
        if getattr(parameter, "tensor_model_parallel", False):
            shape = list(parameter.shape)
            shape[parameter.partition_dim] *= size
            parameter.data = parameter.new_empty(shape)
