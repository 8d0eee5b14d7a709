"""Read a checkpoint with Megatron-core, and write one, on two processes; run under torchrun."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from nemo_kd.mcore import cpu

cpu.install()

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor  # noqa: E402


def sharded(data: torch.Tensor | None, table: torch.Tensor | None) -> dict[str, object]:
    """This rank's half of the rows of three layers, and of a table padded to eight rows."""
    rank = torch.distributed.get_rank()
    state: dict[str, object] = {}
    for layer in range(3):
        part = torch.zeros(3, 4) if data is None else data[layer].chunk(2)[rank].contiguous()
        state[f"w.{layer}"] = ShardedTensor.from_rank_offsets(
            "layers.w", part, (0, layer, 3), (1, rank, 2), prepend_axis_num=1
        )
        if rank == 0:
            state[f"extra.{layer}"] = ShardedObject("layers._extra_state", None, (3,), (layer,))
    half = torch.zeros(4, 4, dtype=torch.bfloat16) if table is None else table.chunk(2)[rank]
    state["table"] = ShardedTensor.from_rank_offsets(
        "table", half.contiguous(), (0, rank, 2), allow_shape_mismatch=True
    )
    return state


def main(directory: Path) -> None:
    torch.distributed.init_process_group("gloo")
    state = dist_checkpointing.load(sharded(None, None), str(directory / "ours"))
    parts: list[dict[str, torch.Tensor]] = [{}, {}]
    torch.distributed.all_gather_object(parts, state)
    w = torch.stack([torch.cat([part[f"w.{layer}"] for part in parts]) for layer in range(3)])
    table = torch.cat([part["table"] for part in parts])
    if torch.distributed.get_rank() == 0:
        extra = state["extra.0"]
        torch.save({"w": w, "table": table, "extra": extra}, directory / "read.pt")
        (directory / "theirs").mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(sharded(w, table), str(directory / "theirs"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
