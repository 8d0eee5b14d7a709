"""A sample is trusted if the teacher would have given its answer, token by token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from split_trusted import knows, main

from nemo_kd.store import Store
from nemo_kd.store.tools.transform import write_samples
from tests.store.samples import sample, spec


def test_every_sample_is_in_one_part_by_the_teachers_first_choice(tmp_path: Path) -> None:
    samples = []
    for row in range(6):
        one = sample(row, spec(), answers=4)
        tokens = one.input_ids.copy()
        tokens[one.answer_positions()] = one.topk.ids[:, 0]
        if row % 3 == 0:
            tokens[-1] = one.topk.ids[-1, 1]  # the teacher's second choice
        samples.append(replace(one, input_ids=tokens))
    assert [knows(one) for one in samples] == [False, True, True] * 2
    write_samples(samples, tmp_path / "store", spec())
    main(tmp_path / "store", tmp_path / "parts")
    trusted, rest = (Store(tmp_path / "parts" / name) for name in ("trusted", "rest"))
    assert [one.row for one in trusted] == [1, 2, 4, 5]
    assert [one.row for one in rest] == [0, 3]
    for one in (*trusted, *rest):
        np.testing.assert_array_equal(one.topk.ids, samples[one.row].topk.ids)
