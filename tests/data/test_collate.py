"""Teacher rows reach the logits of their own targets, whatever the batch looks like."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_kd.data import collate_teacher, teacher_at
from nemo_kd.store import Sample, StoreError

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
        topk_ids=name[:, None] * 10 + np.arange(K),
        topk_logits=(name[:, None] + np.arange(K)).astype(np.float32),
        logsumexp=(name[:, None] + np.arange(TEMPERATURES) / 2).astype(np.float32),
    )


masks = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=7), min_size=1, max_size=5)


@settings(deadline=None)
@given(masks=masks, temperature_index=st.integers(0, TEMPERATURES - 1))
def test_each_target_gets_its_own_teacher_row(
    masks: list[list[int]], temperature_index: int
) -> None:
    samples = [sample(row, mask) for row, mask in enumerate(masks)]
    length = max(len(mask) for mask in masks)
    loss_mask = torch.tensor([mask + [0] * (length - len(mask)) for mask in masks])  # [B, S]
    selected = teacher_at(collate_teacher(samples, temperature_index), loss_mask)
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
    batch = collate_teacher([sample(0, [0, 0]), sample(1, [0, 0])], 0)
    selected = teacher_at(batch, torch.zeros(2, 2))
    assert selected.topk.ids.shape == (0, K) and not selected.mask.any()


def test_stores_of_different_k_do_not_mix() -> None:
    other = sample(1, [1])
    narrow = Sample(
        row=1,
        input_ids=other.input_ids,
        loss_mask=other.loss_mask,
        topk_ids=other.topk_ids[:, :2],
        topk_logits=other.topk_logits[:, :2],
        logsumexp=other.logsumexp,
    )
    with pytest.raises(StoreError, match="row 1 has 2 logits a token, others in its batch 3"):
        collate_teacher([sample(0, [1]), narrow], 0)
