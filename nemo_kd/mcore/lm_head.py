"""The LM head of a Megatron GPTModel, apart from the rest of its forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

LMHead = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def split_lm_head(gpt: GPTModel) -> Iterator[LMHead | None]:
    """Within it the last stage returns final hidden states `[S, B, H]`, and the LM head is apart.

    Yields, on the last stage, the head as a function of hidden states `[N, H]` → logits
    `[N, Vp]` (soft-caps, biases and adapters of the output layer included); None on the other
    stages. Under sequence parallelism the hidden states are this rank's `[S/TP, B, H]`: gather
    them first, the head does not.
    """
    if not gpt.post_process:
        yield None
        return
    tied = gpt.share_embeddings_and_output_weights
    weight = gpt.shared_embedding_or_output_weight() if tied else None
    layer = gpt.output_layer
    sequence_parallel = layer.sequence_parallel

    def head(hidden: torch.Tensor) -> torch.Tensor:
        logits, _ = layer(hidden.unsqueeze(1), weight=weight)  # [N, 1, Vp]
        return logits.squeeze(1)

    gpt.post_process = layer.sequence_parallel = False
    try:
        yield head
    finally:
        gpt.post_process, layer.sequence_parallel = True, sequence_parallel


def gpt_module(model: Any) -> GPTModel:
    """Megatron's GPTModel of this pipeline stage, out of the precision wrappers.

    `model` is a NeMo model.
    """
    (module,) = model.get_model_module_list()
    while hasattr(module, "module"):
        module = module.module
    return module
