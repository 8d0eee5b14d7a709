"""A dump is the same on every layout, and the teacher's own, dense distribution on one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nemo_kd.store import Store


def test_every_row_and_answer_token_is_stored(dump: Callable[..., Path], tiny: Path) -> None:
    store = Store(dump())
    rows = (tiny / "train.jsonl").read_text().splitlines()
    assert [sample.row for sample in store] == list(range(len(rows)))
    for sample in store:
        answers = int(sample.loss_mask[1:].sum())
        assert answers > 1
        assert sample.topk_ids.shape == sample.topk_logits.shape == (answers, 20)
        assert sample.logsumexp.shape == (answers, 2)
        assert (np.diff(sample.topk_logits, axis=1) <= 0).all()


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2"])
def test_layouts_agree(dump: Callable[..., Path], layout: str) -> None:
    one, other = Store(dump()), Store(dump(layout))
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert np.array_equal(a.input_ids, b.input_ids)
        assert np.array_equal(a.loss_mask, b.loss_mask)
        assert np.array_equal(a.topk_ids, b.topk_ids)
        # Relative logits are stored in float16: one unit in the last place of values up to 16.
        assert np.abs(a.topk_logits - b.topk_logits).max() < 2**-6
        assert np.abs(a.logsumexp - b.logsumexp).max() < 1e-5


def test_data_parallel_dump_has_the_same_bytes(dump: Callable[..., Path]) -> None:
    files = sorted(path.relative_to(dump()) for path in dump().rglob("*") if path.is_file())
    assert len(files) > 5
    for file in files:
        assert (dump() / file).read_bytes() == (dump("dp2") / file).read_bytes(), file
