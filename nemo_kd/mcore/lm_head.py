"""A Megatron GPTModel's LM head, separated from the rest of its forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from nemo_kd.teacher.forward import LMHead

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


@contextmanager
def split_lm_head(gpt: GPTModel) -> Iterator[LMHead | None]:
    """Make the last stage return its final hidden states `[S, B, H]` while the context is open.

    Yields the LM head as a function of hidden states `[N, H]` → logits `[N, Vp]` (soft-caps, biases
    and adapters of the output layer included), or None on the other stages. Under sequence
    parallelism the hidden states are this rank's `[S/TP, B, H]`; the caller gathers them, the LM
    head does not.
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


def in_head_dtype(hidden: torch.Tensor, gpt: GPTModel) -> torch.Tensor:
    """Cast hidden states [..., H] of the last stage to the dtype of the LM head's weight.

    Megatron's `Float16Module` returns bf16 and fp16 hidden states as float32, so this is exact.
    Under autocast, which casts both, they are returned unchanged.
    """
    if gpt.config.enable_autocast:
        return hidden
    weight = next(gpt.output_layer.parameters(), None)
    if weight is None:  # tied to the embedding of the same stage
        weight = gpt.embedding.word_embeddings.weight
    return hidden.to(weight.dtype)


def gpt_module(model: Any) -> GPTModel:
    """Return the GPTModel of this pipeline stage, without the wrappers around it."""
    while hasattr(model, "module"):
        model = model.module
    return model
