"""`examples/megatron_core/train.py` from weights that no layout changes: `torchrun … OPTIONS`.

Each parameter is drawn by the name that it has in the whole model, and a tensor-parallel rank takes
its part, so that the losses of any two layouts can be compared. They are printed to eight decimals.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import zlib
from pathlib import Path
from typing import Any

import torch

EXAMPLE = Path(__file__).parent.parent.parent / "examples/megatron_core/train.py"


def loaded(program: Path) -> Any:
    """The module of a program."""
    spec = importlib.util.spec_from_file_location(program.stem, program)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    train = loaded(EXAMPLE)
    build = train.student

    def student(args: argparse.Namespace, vocab_size: int) -> list[torch.nn.Module]:
        parts = build(args, vocab_size)
        for part in parts:
            draw(part.module, vocab_size)
        return parts

    train.student, train.DECIMALS = student, 8
    train.main()


@torch.no_grad()
def draw(gpt: Any, vocab_size: int) -> None:
    for name, parameter in gpt.named_parameters():
        if parameter.dim() > 1:
            whole = re.sub(
                r"layers\.(\d+)",
                lambda found: f"layers.{gpt.decoder.layers[int(found[1])].layer_number}",
                name.replace("output_layer.weight", "embedding.word_embeddings.weight"),
            )
            parameter.copy_(part_of(whole, parameter, vocab_size))


def part_of(name: str, parameter: Any, vocab_size: int) -> torch.Tensor:
    """This rank's part of the weight `name` [rows, columns]; rows beyond the vocabulary are 0."""
    from megatron.core import parallel_state

    ranks = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    shape, dim = list(parameter.shape), parameter.partition_dim
    shape[dim] *= ranks
    rows = min(shape[0], vocab_size) if "embedding" in name else shape[0]
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    whole = torch.zeros(shape)
    whole[:rows] = 0.1 * torch.randn(rows, shape[1], generator=generator)
    if "linear_fc1" in name:  # the gate above the values: a rank has a part of each
        return torch.cat([half.chunk(ranks)[rank] for half in whole.chunk(2)])
    return whole.chunk(ranks, dim)[rank]


if __name__ == "__main__":
    main()
