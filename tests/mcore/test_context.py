"""Every answer token weighs the same on any number of context-parallel ranks: see `context.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.processes import run_program


def found(directory: Path, ranks: int) -> dict[str, Any]:
    own = directory / str(ranks)
    own.mkdir()
    done = run_program("tests/mcore/context.py", own, processes=ranks)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_step_over_context_parallel_ranks_is_that_of_one_process(
    tmp_path: Path, ranks: int
) -> None:
    """In both of Megatron's averages, though the answers are mostly those of one rank."""
    one, several = found(tmp_path, 1), found(tmp_path, ranks)
    assert one["True"][0] != one["False"][0]
    for kind in ("True", "False"):
        (expected, reports), (gradient, other) = one[kind], several[kind]
        np.testing.assert_allclose(gradient, expected, atol=1e-7)  # float32 sums in another order
        assert reports.keys() == other.keys()
        for name, sums in reports.items():
            assert other[name] == pytest.approx(sums, rel=1e-6)
