"""Teachers with logits of -inf, NaN and +inf: absent ids, and rows without a distribution."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from nemo_kd.loss import vocab_parallel_topk
from nemo_kd.teacher.sampling import uniforms, vocab_parallel_sample
from tests.loss.ranks import Check, Ranks, check_name
from tests.loss.sharded import columns, group, padded

V = 53
FINITE = (1, 2, 7, 20, V)


def logits(dtype: torch.dtype) -> torch.Tensor:
    """[N, V]: row i has `FINITE[i]` logits above -inf, in columns that two ranks share unevenly."""
    generator = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(len(FINITE), V, generator=generator)
    for row, count in enumerate(FINITE):
        z[row, torch.randperm(V, generator=generator)[count:]] = -torch.inf
    z[1, :30] = -torch.inf  # nothing on the first of two ranks
    z[1, 40] = 1.0
    return z.to(dtype)


def shard(z: torch.Tensor) -> torch.Tensor:
    """This rank's columns, with padding that no teacher may choose."""
    whole = torch.full((len(z), padded(V)), 50.0, dtype=z.dtype)
    whole[:, :V] = z
    return whole[:, columns(padded(V))].contiguous()


def check_topk(k: int, dtype: torch.dtype) -> None:
    z = logits(dtype)
    topk = vocab_parallel_topk(shard(z), k, group=group(), vocab_size=V, temperatures=(1.0, 2.0))
    dense = z.double().numpy()
    order = np.argsort(-dense, axis=1, kind="stable")[:, :k]
    expected = np.take_along_axis(dense, order, 1)
    assert np.array_equal(topk.logits.double().numpy(), expected)
    assert np.array_equal(topk.ids.numpy(), np.where(np.isneginf(expected), -1, order))
    assert topk.logsumexp is not None
    for j, temperature in enumerate((1.0, 2.0)):
        lse = np.logaddexp.reduce(dense / temperature, axis=1)
        assert np.allclose(topk.logsumexp[:, j].numpy(), lse, atol=1e-5)


def check_sample(draws: int) -> None:
    z = logits(torch.float32)
    topk = vocab_parallel_sample(
        shard(z), draws, uniforms(0, 0, len(z)), group=group(), vocab_size=V
    )
    drawn = topk.ids >= 0
    assert torch.equal(drawn, topk.logits.isfinite()) and drawn[:, 0].all()
    assert z.gather(1, topk.ids.clamp_min(0))[drawn].isfinite().all()
    assert torch.allclose(topk.logits.double().exp().sum(1), torch.ones(len(z)).double())


def check_no_distribution() -> None:
    """NaN of either sign, +inf, or no finite logit is always detected and affects no other row."""
    z = logits(torch.float32)[-1:].repeat(7, 1)
    sign = torch.tensor(-1.0).copysign(torch.tensor(-1.0))
    for row, (place, value) in enumerate(
        [(0, torch.nan), (V - 1, torch.nan), (0, torch.inf), (V - 1, torch.inf)]
    ):
        z[row, place] = value
    z[4, 3] = torch.copysign(torch.tensor(torch.nan), sign)
    z[5] = -torch.inf
    mine = {"group": group(), "vocab_size": V}
    topk = vocab_parallel_topk(shard(z), 5, **mine)  # type: ignore[arg-type]
    assert topk.logsumexp is not None
    usable = topk.logsumexp.isfinite() & topk.logits[:, 0].isfinite()
    assert usable.tolist() == [False] * 6 + [True]
    assert (topk.ids[5] == -1).all()
    drawn = vocab_parallel_sample(shard(z), 5, uniforms(0, 0, 7), **mine)  # type: ignore[arg-type]
    assert drawn.logits[:6].isnan().all() and not drawn.logits[6].isnan().any()


CHECKS: list[Check] = [
    *[
        partial(check_topk, k, dtype)
        for k in (1, 5, 33, V)
        for dtype in (torch.float32, torch.bfloat16)
    ],
    *[partial(check_sample, draws) for draws in (1, 50)],
    check_no_distribution,
]


@pytest.mark.parametrize("ranks", [1, 2], indirect=True)
@pytest.mark.parametrize("check", CHECKS, ids=check_name)
def test_absent_ids_and_rows_without_a_distribution(ranks: Ranks, check: Check) -> None:
    ranks.run(check)
