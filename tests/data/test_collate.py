"""Teacher rows reach the logits of their own targets, whatever the batch looks like."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_kd.data import TeacherRows, collate_teacher, teacher_at
from nemo_kd.store import Sample
from nemo_kd.topk import TopK

K, TEMPERATURES = 3, 2


def sample(row: int, mask: list[int]) -> Sample:
    """Teacher values name their row and target position, so that a misplaced one shows."""
    loss_mask = np.array([0, *mask], dtype=np.uint8)
    targets = np.flatnonzero(loss_mask)
    name = 1000 * row + targets
    return Sample(
        row=row,
        input_ids=np.arange(len(loss_mask), dtype=np.int32),
        loss_mask=loss_mask,
        topk=TopK(
            ids=name[:, None] * 10 + np.arange(K),
            logits=(name[:, None] + np.arange(K)).astype(np.float32),
            logsumexp=(name[:, None] + np.arange(TEMPERATURES) / 2).astype(np.float32),
            temperatures=(1.0, 2.0),
        ),
    )


def collate(samples: list[Sample], temperature_index: int) -> dict[str, torch.Tensor]:
    return collate_teacher([TeacherRows.of(sample, temperature_index) for sample in samples])


masks = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=7), min_size=1, max_size=5)


@settings(deadline=None)
@given(masks=masks, temperature_index=st.integers(0, TEMPERATURES - 1))
def test_each_target_gets_its_own_teacher_row(
    masks: list[list[int]], temperature_index: int
) -> None:
    samples = [sample(row, mask) for row, mask in enumerate(masks)]
    length = max(len(mask) for mask in masks)
    loss_mask = torch.tensor([mask + [0] * (length - len(mask)) for mask in masks])  # [B, S]
    selected = teacher_at(collate(samples, temperature_index), loss_mask)
    expected = [
        1000 * b + s + 1  # the label at position s is token s + 1
        for s in range(length)
        for b in range(len(masks))
        if loss_mask[b, s]
    ]
    assert torch.equal(selected.mask, loss_mask.t().bool())
    assert selected.topk.ids.tolist() == [[10 * name + j for j in range(K)] for name in expected]
    assert selected.topk.logits[:, 0].tolist() == expected
    assert selected.topk.logsumexp.tolist() == [n + temperature_index / 2 for n in expected]


def test_a_batch_without_answers_selects_nothing() -> None:
    batch = collate([sample(0, [0, 0]), sample(1, [0, 0])], 0)
    selected = teacher_at(batch, torch.zeros(2, 2))
    assert selected.topk.ids.shape == (0, K) and not selected.mask.any()


def test_rows_of_fewer_ids_get_absent_ones() -> None:
    """Stores of another K, and profiles whose K differs from token to token."""
    wide, other = sample(0, [1, 1]), sample(1, [1])
    one_id = replace(other.topk, ids=other.topk.ids[:, :1], logits=other.topk.logits[:, :1])
    narrow = replace(other, topk=one_id)
    ids, logits = wide.topk.ids.copy(), wide.topk.logits.copy()
    ids[:, 2], logits[:, 2] = -1, -np.inf
    ids[0, 1], logits[0, 1] = -1, -np.inf
    ragged = replace(wide, topk=replace(wide.topk, ids=ids, logits=logits))
    batch = collate_teacher([TeacherRows.of(ragged, 0), TeacherRows.of(narrow, 0)])
    assert batch["teacher_ids"].shape == (2, 2, 2)  # no wider than what is there
    selected = teacher_at(batch, torch.tensor([[1, 1], [1, 0]])).topk
    assert selected.ids.tolist() == [[10, -1], [10010, -1], [20, 21]]
    assert selected.logits.tolist() == [[1, -np.inf], [1001, -np.inf], [2, 3]]
