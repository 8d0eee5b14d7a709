"""A Llama's weights as a Megatron distributed checkpoint, which loads at any TP × PP.

The names are those of TransformerEngine's layers, under which megatron-core's local layers
(CPU, no TransformerEngine) save and load as well. Layers are slices of one tensor `[L, …]`:

    linear_qkv  [L, G·(H/G + 2)·D, hidden]   for each query group: its queries, its key, its value
    linear_fc1  [L, 2·ffn, hidden]           gate above up

with H heads, G query groups, D head size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_kd.checkpoints.llama import Checkpoint, CheckpointError, Llama

LAYERS = "model.decoder.layers"
# TransformerEngine's layers keep FP8 scales under these names, empty without FP8, and megatron-core
# requires all of them on loading. Its local layers have only the four linear ones, so a .nemo that
# NeMo saves on a CPU lacks those of the attention and the final norm.
LAYER_EXTRA_STATES = (
    "self_attention.core_attention",
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


def qkv_weight(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: int, head_dim: int
) -> torch.Tensor:
    """`[H·D, hidden], [G·D, hidden], [G·D, hidden]` → `[G·(H/G + 2)·D, hidden]`, by query group."""
    hidden = q.shape[-1]
    parts = [weight.view(groups, -1, head_dim, hidden) for weight in (q, k, v)]
    return torch.cat(parts, dim=1).reshape(-1, hidden)


def layer_weights(checkpoint: Checkpoint, layer: int) -> Iterator[tuple[str, torch.Tensor]]:
    """(Megatron's name within the layer, weight) of each tensor."""
    llama = checkpoint.llama

    def read(name: str) -> torch.Tensor:
        return checkpoint.tensor(f"model.layers.{layer}.{name}.weight")

    q, k, v = (read(f"self_attn.{part}_proj") for part in "qkv")
    qkv = qkv_weight(q, k, v, llama.num_kv_heads, llama.head_dim)
    yield "self_attention.linear_qkv.weight", qkv
    yield "self_attention.linear_qkv.layer_norm_weight", read("input_layernorm")
    yield "self_attention.linear_proj.weight", read("self_attn.o_proj")
    yield "mlp.linear_fc1.weight", torch.cat([read("mlp.gate_proj"), read("mlp.up_proj")])
    yield "mlp.linear_fc1.layer_norm_weight", read("post_attention_layernorm")
    yield "mlp.linear_fc2.weight", read("mlp.down_proj")


def global_weights(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """(Megatron's name, weight) of each tensor outside the layers."""
    yield "model.embedding.word_embeddings.weight", checkpoint.tensor("model.embed_tokens.weight")
    yield "model.decoder.final_layernorm.weight", checkpoint.tensor("model.norm.weight")
    if not checkpoint.llama.tied:
        yield "model.output_layer.weight", checkpoint.tensor("lm_head.weight")


def sharded_state(
    checkpoint: Checkpoint,
    keep_layers: Sequence[int],
    vocab_size: int,
    dtype: torch.dtype,
    layer_read: Callable[[], None],
) -> dict[str, Any]:
    """Sharded state of the kept layers; embedding and LM head are cut to `vocab_size` rows.

    `layer_read` is called after each layer.
    """
    from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor

    state: dict[str, Any] = {}
    count = len(keep_layers)
    for key, weight in global_weights(checkpoint):
        cut = weight[:vocab_size] if weight.dim() == 2 else weight
        state[key] = ShardedTensor.from_rank_offsets(key, cut.to(dtype).contiguous())
    final = "model.decoder.final_layernorm._extra_state"
    state[final] = ShardedObject(final, None, (1,), (0,))
    for position, layer in enumerate(keep_layers):
        for name, weight in layer_weights(checkpoint, layer):
            state[f"{LAYERS}.{position}.{name}"] = ShardedTensor.from_rank_offsets(
                f"{LAYERS}.{name}",
                weight.to(dtype).contiguous(),
                (0, position, count),
                prepend_axis_num=1,
            )
        for name in LAYER_EXTRA_STATES:
            key = f"{LAYERS}.{name}._extra_state"
            state[f"{LAYERS}.{position}.{name}._extra_state"] = ShardedObject(
                key, None, (count,), (position,)
            )
        layer_read()
    return state


def save(state: dict[str, Any], directory: Path) -> None:
    """Write `state` to `directory` from a single process, in a process group of one."""
    from megatron.core import dist_checkpointing

    directory.mkdir(parents=True)
    with _process_group_of_one():
        dist_checkpointing.save(state, str(directory))


@contextlib.contextmanager
def _process_group_of_one() -> Iterator[None]:
    if torch.distributed.is_initialized():
        if torch.distributed.get_world_size() > 1:
            raise CheckpointError(
                f"a conversion runs in one process, not in {torch.distributed.get_world_size()}: "
                "start it with python instead of torchrun"
            )
        yield
        return
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def count_parameters(llama: Llama, num_layers: int, vocab_size: int) -> int:
    """Number of weights in the converted model."""
    shapes = [torch.Size(shape) for shape in llama.layer_shapes(0).values()]
    embedding = vocab_size * llama.hidden_size * (1 if llama.tied else 2)
    return num_layers * sum(shape.numel() for shape in shapes) + embedding + llama.hidden_size
