"""The container of a teacher's rows: temperatures, selection, conversion."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nemo_kd.topk import TopK, t1_index


def rows(temperatures: tuple[float, ...]) -> TopK:
    """Two rows of three ids; column j of the log-sum-exp holds 10 j."""
    columns = 10 * np.arange(len(temperatures), dtype=np.float32)
    return TopK(
        ids=np.array([[4, 2, 7], [1, 0, -1]]),
        logits=np.array([[3, 2, 1], [2, 1, -np.inf]], np.float32),
        logsumexp=np.tile(columns, (2, 1)),
        temperatures=temperatures,
    )


def test_fields_cannot_be_swapped_unseen() -> None:
    with pytest.raises(TypeError, match="positional"):
        TopK(np.zeros((1, 1)), np.zeros((1, 1)), np.zeros(1))  # type: ignore[call-arg]


@pytest.mark.parametrize(("temperature", "value"), [(1.0, 10), (2.0, 0), (0.5, 20)])
def test_the_log_sum_exp_of_one_temperature_is_picked(temperature: float, value: int) -> None:
    one = rows((2.0, 1.0, 0.5)).at(temperature)
    assert one.logsumexp.tolist() == [value, value]
    assert one.temperatures == (temperature,) and one.at(temperature) is one


def test_another_temperature_is_refused_and_an_unknown_log_sum_exp_is_not() -> None:
    with pytest.raises(ValueError, match=r"at temperature 1, 2, .* 1\.5"):
        rows((1.0, 2.0)).at(1.5)
    unknown = TopK(ids=torch.zeros(1, 1), logits=torch.zeros(1, 1), logsumexp=None)
    assert unknown.at(3.0).temperatures == (3.0,)


def test_rows_are_selected_together() -> None:
    second = rows((1.0,))[1:]
    assert len(second) == 1 and second.ids.tolist() == [[1, 0, -1]]
    assert second.logits[0, 0] == 2 and second.logsumexp.shape == (1, 1)


def test_tensors_share_the_arrays_memory() -> None:
    arrays = rows((1.0,))
    tensors = arrays.tensors()
    arrays.logits[0, 0] = 9
    assert tensors.logits[0, 0] == 9 and tensors.ids.dtype == torch.int64


def test_the_place_of_temperature_1() -> None:
    assert t1_index((2.0, 1.0)) == 1
