"""Of the checks' own harness: a failure names the rank, and spoils no later check."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from tests.loss.ranks import Ranks


def check_sum() -> None:
    total = torch.ones(1)
    dist.all_reduce(total)
    assert int(total) == dist.get_world_size()


def check_fails_on_rank_1() -> None:
    assert dist.get_rank() != 1, "as it must"
    dist.barrier()


def check_dies_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_a_failing_rank_is_named_and_the_next_check_runs(ranks: Ranks) -> None:
    ranks.run(check_sum)
    with pytest.raises(pytest.fail.Exception, match=r"(?s)rank 1: .*as it must"):
        ranks.run(check_fails_on_rank_1)
    ranks.run(check_sum)
    with pytest.raises(pytest.fail.Exception, match="rank 1: the process died"):
        ranks.run(check_dies_on_rank_1)
    ranks.run(check_sum)
