"""Packed sequences: several samples in one row, independent of each other.

The samples of a pack follow one another; `cu_seqlens` says where each ends, for attention and
rotary positions, and position ids restart at 0. A sample of L tokens takes L - 1 positions, so that
its last label is its own last token and never the first token of the next sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

Part = tuple[Sequence[int], Sequence[float]]
"""A sample's tokens and its loss mask, of equal length."""

ROW_KEYS = ("tokens", "labels", "loss_mask", "position_ids")


def collate_packs(
    packs: Sequence[Sequence[Part]], length: int, pad_id: int
) -> dict[str, torch.Tensor]:
    """Collate B packs under NeMo's keys for packed sequences.

    `ROW_KEYS` [B, length] int64; `cu_seqlens` [B, sequences + 1] int32, from 0 to `length` and
    then -1, with `cu_seqlens_argmin` [B, 1], how many there are; `max_seqlen` [B, 1]. The padding
    at the end of a pack is a sequence of its own with a loss mask of 0, so that an attention kernel
    leaves no position undefined.
    """
    rows = [_row(pack, length, pad_id) for pack in packs]
    boundaries = [ends for _, ends in rows]
    # At least one -1 in each row: NeMo cuts at the first.
    filled = torch.full((len(rows), max(map(len, boundaries)) + 1), -1, dtype=torch.int32)
    for row, ends in zip(filled, boundaries, strict=True):
        row[: len(ends)] = ends
    counts = torch.tensor([[len(ends)] for ends in boundaries])
    return {
        **{key: torch.stack([row[key] for row, _ in rows]) for key in ROW_KEYS},
        "cu_seqlens": filled,
        "cu_seqlens_argmin": counts,
        "cu_seqlens_unpadded": filled,
        "cu_seqlens_unpadded_argmin": counts,
        "max_seqlen": torch.stack([ends.diff().max() for ends in boundaries])[:, None],
    }


def _row(
    pack: Sequence[Part], length: int, pad_id: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """`ROW_KEYS` [length], and the boundaries of its sequences, padding included."""
    row = {key: torch.zeros(length, dtype=torch.long) for key in ROW_KEYS}
    row["tokens"].fill_(pad_id)
    row["labels"].fill_(pad_id)
    ends, end = {0, length}, 0
    for tokens, loss_mask in pack:
        ids = torch.tensor(tokens)
        start, end = end, end + len(ids) - 1
        if end > length:
            raise ValueError(f"the samples of a pack have more than its {length} inputs")
        row["tokens"][start:end] = ids[:-1]
        row["labels"][start:end] = ids[1:]
        row["loss_mask"][start:end] = torch.tensor(loss_mask[1:])
        row["position_ids"][start:end] = torch.arange(end - start)
        ends.add(end)
    return row, torch.tensor(sorted(ends), dtype=torch.int32)
