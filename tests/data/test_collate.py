"""Teacher rows reach the logits of their own answer tokens, whatever the batch looks like."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_kd.data import AnswerTokens, answer_tokens, joined, no_teacher, teacher_of
from nemo_kd.store import Sample
from nemo_kd.topk import TopK

K, TEMPERATURES = 3, (1.0, 2.0)


def sample(row: int, mask: list[int]) -> Sample:
    """Teacher values name their row and answer position, so that a misplaced one shows."""
    loss_mask = np.array([0, *mask], dtype=np.uint8)
    targets = np.flatnonzero(loss_mask)
    name = 1000 * row + targets
    topk = TopK(
        ids=name[:, None] * 10 + np.arange(K),
        logits=(name[:, None] + np.arange(K)).astype(np.float32),
        logsumexp=(name[:, None] + np.arange(len(TEMPERATURES)) / 2).astype(np.float32),
        temperatures=TEMPERATURES,
    )
    ids = np.arange(len(loss_mask), dtype=np.int32)
    return Sample(row=row, input_ids=ids, loss_mask=loss_mask, topk=topk)


def padded(masks: list[list[int]]) -> torch.Tensor:
    """[B, S]: the masks of the labels, filled up with 0."""
    length = max(len(mask) for mask in masks)
    return torch.tensor([mask + [0] * (length - len(mask)) for mask in masks])


def collated(masks: list[list[int]], temperature: float = 1.0) -> AnswerTokens:
    samples = [sample(row, mask) for row, mask in enumerate(masks)]
    return answer_tokens(padded(masks), [teacher_of(each, temperature) for each in samples])


masks = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=7), min_size=1, max_size=5)


@settings(deadline=None)
@given(masks=masks, temperature=st.sampled_from(TEMPERATURES))
def test_each_answer_token_gets_its_own_teacher_row(
    masks: list[list[int]], temperature: float
) -> None:
    loss_mask = padded(masks)  # [B, S]
    answers = collated(masks, temperature)
    expected = [
        1000 * b + s + 1  # the label at position s is token s + 1
        for s in range(loss_mask.shape[1])
        for b in range(len(masks))
        if loss_mask[b, s]
    ]
    of_mask = loss_mask.t().reshape(-1).nonzero().squeeze(-1)  # in Megatron's [S, B] layout
    assert answers.positions.equal(of_mask)
    assert answers.topk.ids.tolist() == [[10 * name + j for j in range(K)] for name in expected]
    assert answers.topk.logits[:, 0].tolist() == expected
    column = TEMPERATURES.index(temperature)
    assert answers.topk.logsumexp.tolist() == [name + column / 2 for name in expected]
    assert answers.topk.temperatures == (temperature,)


def test_a_sequence_without_mask_uses_none_of_its_rows() -> None:
    teachers = [teacher_of(sample(row, [1, 1]), 1.0) for row in range(2)]
    answers = answer_tokens(torch.tensor([[0, 0], [1, 1]]), teachers)
    assert answers.topk.ids[:, 0].tolist() == [10010, 10020]
    nothing = answer_tokens(torch.zeros(2, 2), teachers)
    assert nothing.positions.shape == (0,) and nothing.topk.ids.shape == (0, K)


@pytest.mark.parametrize("mask", [[1, 1, 1], [1, 0, 0]])
def test_a_mask_of_other_tokens_than_the_teachers_is_refused(mask: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"sequence 0 .* {sum(mask)} answer tokens .* has 2 rows"):
        answer_tokens(torch.tensor([mask]), [teacher_of(sample(0, [1, 1, 0]), 1.0)])


def test_rows_of_several_widths_are_filled_up_with_absent_ids() -> None:
    wide, other = sample(0, [1, 1]), sample(1, [1])
    topk = other.topk
    narrow = replace(other, topk=replace(topk, ids=topk.ids[:, :1], logits=topk.logits[:, :1]))
    ids, logits = wide.topk.ids.copy(), wide.topk.logits.copy()
    ids[:, 2], logits[:, 2] = -1, -np.inf
    ids[0, 1], logits[0, 1] = -1, -np.inf
    ragged = replace(wide, topk=replace(wide.topk, ids=ids, logits=logits))
    parts = [teacher_of(ragged, 1.0), teacher_of(narrow, 1.0)]
    assert joined(parts).ids.shape == (3, 2)  # no wider than its longest row
    answers = answer_tokens(torch.tensor([[1, 1], [1, 0]]), parts)
    assert answers.topk.ids.tolist() == [[10, -1], [10010, -1], [20, 21]]
    assert answers.topk.logits.tolist() == [[1, -np.inf], [1001, -np.inf], [2, 3]]


def test_a_sequence_has_its_own_weights_or_those_of_the_training() -> None:
    teachers = [teacher_of(sample(0, [1, 1]), 1.0), no_teacher(1, 1.0)]
    both = torch.tensor([[1, 1], [0, 1]])
    answers = answer_tokens(both, teachers, [None, 0.0])
    weights = answers.weights((0.25, 0.75))
    assert weights is not None
    assert weights.tolist() == [[0.25, 0.75], [0.25, 0.75], [1.0, 0.0]]
    assert answers.topk.ids[:, 0].tolist() == [10, 20, -1]
    assert answer_tokens(both, teachers, [None, None]).weights((0.25, 0.75)) is None
