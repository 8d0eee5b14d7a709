"""Draws from the full distribution: unbiased, of small variance, the same on every sharding."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_kd.store import Sample, Store
from nemo_kd.teacher.sampling import uniforms, vocab_parallel_sample
from nemo_kd.topk import TopK
from tests.loss.ranks import Ranks
from tests.loss.sharded import columns, group, padded
from tests.store.samples import spec, write

V = 53


def teacher(rows: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(rows, V, generator=generator)


def counts(logits: torch.Tensor, draws: int, uniform: torch.Tensor) -> torch.Tensor:
    """[N, V]: how often each id was drawn."""
    topk = vocab_parallel_sample(logits, draws, uniform)
    drawn = topk.ids >= 0
    result = torch.zeros(len(logits), logits.shape[-1], dtype=torch.float64)
    values = (topk.logits.double().exp() * draws).masked_fill(~drawn, 0.0)
    return result.scatter_add_(-1, topk.ids.clamp_min(0), values).round()


@pytest.mark.parametrize("draws", [1, 2, 50])
def test_draws_are_unbiased(draws: int) -> None:
    """E over u in [0, 1): M evenly spaced u integrate a step function to within 1 / M per jump."""
    m = 2000
    z = teacher(1)
    p = z.double().softmax(-1)[0]
    spaced = (torch.arange(m, dtype=torch.float64) + 0.5) / m
    mean = counts(z.expand(m, -1), draws, spaced).mean(0) / draws
    assert (mean - p).abs().max() <= 2 / m


def test_counts_are_within_one_of_their_mean_and_add_up() -> None:
    z = teacher(200)
    drawn = counts(z, 50, uniforms(0, 0, 200))
    p = z.double().softmax(-1)
    assert (drawn.sum(-1) == 50).all()
    assert ((drawn - 50 * p).abs() < 1).all()


def test_variance_is_not_above_that_of_independent_draws() -> None:
    m, draws = 4000, 20
    z = teacher(1, spread=1.5)
    p = z.double().softmax(-1)[0]
    spaced = (torch.arange(m, dtype=torch.float64) + 0.5) / m
    variance = (counts(z.expand(m, -1), draws, spaced) / draws).var(0, correction=0)
    assert (variance <= p * (1 - p) / draws + 1e-6).all()


def test_the_gradient_of_a_forward_kl_is_that_of_the_whole_teacher() -> None:
    """d/dz Σ p_hat log(p_hat / q) = q - p_hat, whose mean over the draws is q - p."""
    m = 2000
    z, student = teacher(1), teacher(1, seed=1).double().requires_grad_()
    spaced = (torch.arange(m, dtype=torch.float64) + 0.5) / m
    p_hat = (counts(z.expand(m, -1), 50, spaced) / 50).mean(0)
    (-(p_hat * student.log_softmax(-1)).sum()).backward()
    assert student.grad is not None
    expected = student.detach().softmax(-1) - z.double().softmax(-1)
    torch.testing.assert_close(student.grad, expected, rtol=0, atol=2 / m)


def test_ids_go_by_falling_count_then_by_id_and_the_rest_is_absent() -> None:
    topk = vocab_parallel_sample(teacher(100), 50, uniforms(1, 2, 100))
    assert topk.ids.dtype == torch.int64 and topk.logits.dtype == torch.float32
    absent = topk.ids == -1
    assert torch.equal(absent, topk.logits.isneginf())
    assert not absent[:, 0].any() and not (absent[:, :-1] & ~absent[:, 1:]).any()
    falls = topk.logits[:, :-1] > topk.logits[:, 1:]
    rises = topk.ids[:, :-1] < topk.ids[:, 1:]
    assert (falls | rises | absent[:, 1:]).all()
    assert not topk.logsumexp.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_has_no_probability_is_never_drawn(dtype: torch.dtype) -> None:
    z = teacher(64).to(dtype)
    z[:, ::2] = -torch.inf  # the last column, 52, among them
    ends = torch.tensor([0.0, 1 - 2.0**-53]).repeat(32)
    drawn = counts(z, 50, ends)
    assert not drawn[:, ::2].any() and (drawn.sum(-1) == 50).all()


def test_a_certain_teacher_is_drawn_every_time() -> None:
    z = torch.full((2, V), -200.0)
    z[0, 0] = z[1, V - 1] = 200.0
    topk = vocab_parallel_sample(z, 7, torch.tensor([0.999999, 1e-9], dtype=torch.float64))
    assert topk.ids[:, 0].tolist() == [0, V - 1] and topk.logits[:, 0].tolist() == [0.0, 0.0]


def check_sharded(dtype: torch.dtype, vocab_size: int) -> None:
    whole = torch.full((40, padded(vocab_size)), 50.0)  # padding, far above every real logit
    whole[:, :vocab_size] = teacher(40)[:, :vocab_size]
    whole = whole.to(dtype)
    u = uniforms(3, 4, 40)
    mine = vocab_parallel_sample(
        whole[:, columns(padded(vocab_size))], 50, u, group=group(), vocab_size=vocab_size
    )
    expected = vocab_parallel_sample(whole[:, :vocab_size], 50, u)
    for name in ("ids", "logits", "logsumexp"):
        assert torch.equal(getattr(mine, name), getattr(expected, name)), name


@pytest.mark.parametrize("ranks", [2, 4], indirect=True)
@pytest.mark.parametrize("vocab_size", [V, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_do_not_depend_on_the_sharding(
    ranks: Ranks, dtype: torch.dtype, vocab_size: int
) -> None:
    """V = 1: ranks whose columns are padding only."""
    ranks.run(partial(check_sharded, dtype, vocab_size))


def test_random_numbers_follow_from_seed_row_and_place_alone() -> None:
    a = uniforms(0, 7, 1000)
    assert torch.equal(a[:10], uniforms(0, 7, 10)) and a.dtype == torch.float64
    assert a.min() >= 0 and a.max() < 1
    others = [uniforms(1, 7, 1000), uniforms(0, 8, 1000), uniforms(-5, 7, 1000)]
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([a, other]))[0, 1])) < 0.1
    histogram = torch.histc(torch.cat([uniforms(0, row, 100) for row in range(1000)]), 10, 0, 1)
    assert (histogram / 10_000 - 1).abs().max() < 0.05


def test_what_is_drawn_is_what_a_store_holds(tmp_path: Path) -> None:
    of = spec(vocab_size=V, top_k=50, profile="sampled", profile_options={"seed": 0})
    topk = vocab_parallel_sample(teacher(6), 50, uniforms(0, 0, 6))
    ids, logits = topk.ids.numpy(), topk.logits.numpy()
    mask = np.array([0] + [1] * 6, np.uint8)
    drawn = TopK(ids=ids, logits=logits, logsumexp=np.zeros((6, 1), np.float32), draws=True)
    made = Sample(0, np.arange(7), mask, drawn)
    read = Store(write(tmp_path / "s", of, [made]))[0]
    assert np.array_equal(read.topk.ids, ids) and np.array_equal(read.topk.logits, logits)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="draws is 0"):
        vocab_parallel_sample(teacher(2), 0, uniforms(0, 0, 2))
    with pytest.raises(ValueError, match=r"uniform is \[3\], expected \[2\]"):
        vocab_parallel_sample(teacher(2), 5, uniforms(0, 0, 3))
