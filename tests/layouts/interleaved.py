"""`examples/megatron_core/train.py` from weights that no layout changes: `torchrun … OPTIONS`.

Each parameter is drawn by the name that it has in the whole model, so that the losses of any two
pipelines can be compared.
"""

from __future__ import annotations

import importlib.util
import re
import zlib
from pathlib import Path
from typing import Any

import torch

EXAMPLE = Path(__file__).parent.parent.parent / "examples/megatron_core/train.py"


def main() -> None:
    spec = importlib.util.spec_from_file_location("train", EXAMPLE)
    assert spec and spec.loader
    train: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)
    build = train.student

    def student(*arguments: Any) -> list[torch.nn.Module]:
        parts = build(*arguments)
        for part in parts:
            draw(part.module)
        return parts

    train.student = student
    train.main()


@torch.no_grad()
def draw(gpt: Any) -> None:
    for name, parameter in gpt.named_parameters():
        whole = re.sub(
            r"layers\.(\d+)",
            lambda found: f"layers.{gpt.decoder.layers[int(found[1])].layer_number}",
            name.replace("output_layer.weight", "embedding.word_embeddings.weight"),
        )
        generator = torch.Generator().manual_seed(zlib.crc32(whole.encode()))
        if parameter.dim() > 1:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


if __name__ == "__main__":
    main()
