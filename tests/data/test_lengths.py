"""Samples longer than `max_seq_length`: refused, cut or dropped, and always counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_kd.data import LengthLimit, fit_lengths, truncate_prompt
from nemo_kd.errors import NemoKDError
from nemo_kd.store import Store, StoreError
from tests.store.samples import sample, spec, write

PROMPTS_AND_ANSWERS = ((3, 4), (9, 4), (3, 10), (1, 11), (5, 2), (6, 0), (20, 0))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    of = spec()
    samples = [
        sample(row, of, answers, prompt)
        for row, (prompt, answers) in enumerate(PROMPTS_AND_ANSWERS)
    ]
    return Store(write(tmp_path / "store", of, samples))


def test_what_fits_is_used_whole(store: Store) -> None:
    fitting = fit_lengths(store, LengthLimit(20))
    assert fitting.used.tolist() == list(range(len(store)))
    assert not fitting.truncated and not fitting.dropped


def test_refused_by_default_naming_the_options(store: Store) -> None:
    with pytest.raises(StoreError, match=r"4 of 7 samples .*max_seq_length=11 .*longest has 20"):
        fit_lengths(store, LengthLimit(11))
    with pytest.raises(
        NemoKDError, match=r"over_long is 'cut_prompt': .* Did you mean 'truncate'\?"
    ):
        fit_lengths(store, LengthLimit(11), "cut_prompt")


def test_dropped(store: Store) -> None:
    fitting = fit_lengths(store, LengthLimit(11), "drop")
    assert fitting.used.tolist() == [0, 4, 5]
    assert str(fitting).startswith("0 truncated on the left of their prompt, 4 dropped, 3 samples")


def test_prompts_are_cut_as_far_as_one_token_is_left(store: Store) -> None:
    fitting = fit_lengths(store, LengthLimit(11), "truncate")
    # (3, 10) keeps one token of its prompt; (1, 11) could not.
    assert fitting.used.tolist() == [0, 1, 2, 4, 5, 6]
    assert (fitting.truncated, fitting.dropped) == (3, 1)
    for place in (1, 2, 6):
        whole = store[place]
        cut = truncate_prompt(whole, 11)
        assert len(cut.input_ids) == 11
        assert np.array_equal(cut.input_ids, whole.input_ids[-11:])
        labels = [one.input_ids[one.answer_positions()].tolist() for one in (whole, cut)]
        assert labels[0] == labels[1] and len(labels[1]) == len(cut.topk.ids)


def test_nothing_left_is_an_error(store: Store) -> None:
    with pytest.raises(StoreError, match=r"no sample of at most max_seq_length=3 .*shortest has 6"):
        fit_lengths(store, LengthLimit(3), "drop")


def test_where_the_student_is_the_limit_no_setting_is_to_be_raised(store: Store) -> None:
    """`max_seq_length` is larger already."""
    limit = LengthLimit(3, of_model=True)
    for over_long in ("drop", "error"):
        with pytest.raises(StoreError) as caught:
            fit_lengths(store, limit, over_long)
        said = str(caught.value)
        assert "the student's limit of 3 tokens" in said and "raise" not in said
        assert "train a student with more positions, or set over_long to truncate" in said


@pytest.mark.parametrize("tokens", ["30", 30.5, True])
def test_a_length_is_a_whole_number(store: Store, tokens: Any) -> None:
    with pytest.raises(NemoKDError, match=r"max_seq_length is .*: expected a whole number"):
        fit_lengths(store, LengthLimit(tokens))
