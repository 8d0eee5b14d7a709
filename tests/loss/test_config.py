"""Values of another type than a setting of the loss has: from YAML, argparse, the environment."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from nemo_kd.errors import NemoKDError
from nemo_kd.loss import KDConfig, KDSchedule


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count_padding": "false"}, "count_padding is 'false': expected True or False"),
        ({"count_padding": 1}, "count_padding is 1: expected True or False"),
        ({"count_padding": None}, "count_padding is None: expected True or False"),
        ({"temperature": None}, "temperature is None: expected a number"),
        ({"temperature": "2"}, "temperature is '2': expected a number"),
        ({"beta": None}, "beta is None: expected a number"),
        ({"skew": [0.1]}, r"skew is \[0\.1\]: expected a number"),
        ({"alpha": True}, "alpha is True: expected a number"),
        ({"support": None}, "support is None: expected one of"),
        ({"divergence": 3}, "divergence is 3: expected one of"),
        ({"alpha_end": 0.1, "schedule_steps": True}, "schedule_steps is True: expected a whole"),
        ({"alpha_end": 0.1, "schedule_steps": 2.5}, r"schedule_steps is 2\.5: expected a whole"),
        ({"alpha_end": 0.1, "schedule_steps": "10"}, "schedule_steps is '10': expected a whole"),
        ({"alpha_end": "0.1"}, r"alpha_end is '0\.1': expected a number"),
        ({"alpha_end": 0.1, "schedule": None}, "schedule is None: expected one of"),
    ],
)
def test_values_of_another_type_are_refused(given: dict[str, Any], message: str) -> None:
    known = {each.name for each in fields(KDConfig)}
    for kind in (KDConfig, KDSchedule) if set(given) <= known else (KDSchedule,):
        with pytest.raises(NemoKDError, match=message):
            kind(**given)


def test_numbers_of_numpy_and_what_may_be_none_are_accepted() -> None:
    weights: dict[str, Any] = {"sft_weight": np.float32(0.5), "temperature": np.int64(2)}
    KDConfig(alpha=None, kd_weight=1, **weights)
    flag: Any = np.True_
    KDConfig(count_padding=flag)
    ends: dict[str, Any] = {"alpha_end": np.float64(0.1), "schedule_steps": np.int64(3)}
    KDSchedule(alpha=1, temperature_end=None, **ends)
