"""Triton's kernels against torch's, run by `test_triton.py` under Triton's interpreter on a CPU.

Each is the other's check: maximum, sums, gathered logits and gradient, for every dtype, one and two
temperatures, chosen rows, strided logits, padding, ids that repeat or are on another rank. Then the
teacher's top-K with each of them.
"""

from __future__ import annotations

import itertools
from unittest import mock

import torch

from nemo_kd.loss import kernels, torch_kernels, triton_kernels, vocab_parallel_topk
from nemo_kd.loss.rows import Rows
from nemo_kd.loss.shard import VocabShard

SHARD = VocabShard(start=100, width=90, valid=77, size=177, group=None)
ALIGNED = VocabShard(start=100, width=96, valid=77, size=177, group=None)
EMPTY = VocabShard(start=200, width=90, valid=0, size=177, group=None)


def check(
    dtype: torch.dtype, temperatures: tuple[float, ...], chosen: bool, strided: bool, m: int
) -> None:
    for shard in (SHARD, ALIGNED, EMPTY):
        logits = (torch.randn(5, 3, shard.width) * 5).to(dtype)
        if strided:
            logits = logits.transpose(0, 1).contiguous().transpose(0, 1)
        logits[0, 1, :70] = -200.0  # the sum outside may be far below what is gathered
        positions = torch.tensor([0, 1, 4, 7, 14]) if chosen else None
        rows = Rows.of(logits, positions)
        ids = torch.randint(90, 190, (len(rows), m))
        ids[:, -1] = ids[:, 0]
        ids[-1, 0] = -1  # absent
        before = logits.clone()
        ours = triton_kernels.forward(rows, ids, shard, temperatures)
        torch.testing.assert_close(logits, before, rtol=0, atol=0)  # put back
        theirs = torch_kernels.forward(rows, ids, shard, temperatures)
        torch.testing.assert_close(ours.picked, theirs.picked, rtol=0, atol=0)
        torch.testing.assert_close(ours.top, theirs.top, rtol=0, atol=0)
        some = theirs.top > -torch.inf
        for a, b in zip(ours.log_sum, theirs.log_sum, strict=True):
            torch.testing.assert_close(a[some], b[some], rtol=1e-6, atol=1e-6)

        grad_picked = torch.randn(len(rows), m)
        weights = [torch.randn(len(rows)) * some for _ in temperatures]
        gradients = []
        for implementation, state in ((triton_kernels, ours), (torch_kernels, theirs)):
            out = rows.over(torch.full_like(rows.matrix, 7.0))
            factors = [w / norm for w, norm in zip(weights, state.norm, strict=True)]
            arguments = (rows, ids, shard, temperatures, state.top)
            implementation.backward(*arguments, grad_picked, factors, out)
            gradients.append(out.as_logits())
        half = torch.finfo(dtype).eps
        torch.testing.assert_close(*gradients, rtol=max(half, 1e-5), atol=1e-6)
        in_place = rows.over(rows.matrix.clone())
        triton_kernels.backward(
            in_place,
            *arguments[1:4],
            ours.top,
            grad_picked,
            [w / norm for w, norm in zip(weights, ours.norm, strict=True)],
            in_place,
        )
        torch.testing.assert_close(in_place.as_logits(), gradients[0], rtol=0, atol=0)


def check_topk(dtype: torch.dtype, width: int, valid: int, strided: bool) -> None:
    """Top-K with the kernel's log-sum-exp and without the scratch: the same ids, also of ties."""
    logits = (torch.randn(6, width) * 3).round().to(dtype)
    logits[1], logits[2, 5:] = -torch.inf, -torch.inf
    logits[:, valid:] = 50.0  # padding
    logits = logits.t().contiguous().t() if strided else logits
    found = []
    for chosen in (triton_kernels, torch_kernels):
        with mock.patch.object(kernels, "choose", lambda _, chosen=chosen: chosen):
            found.append(
                vocab_parallel_topk(logits, 9, vocab_size=valid, temperatures=(1.0, 2.0, 0.5))
            )
    ours, theirs = found
    assert ours.ids.equal(theirs.ids) and ours.logits.equal(theirs.logits)
    torch.testing.assert_close(ours.logsumexp, theirs.logsumexp, rtol=1e-6, atol=1e-6)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for dtype, width, valid, strided in (
        (torch.bfloat16, 90, 90, False),
        (torch.bfloat16, 400, 391, False),
        (torch.bfloat16, 384, 384, True),
        (torch.float16, 384, 384, False),
        (torch.float32, 384, 350, True),
    ):
        check_topk(dtype, width, valid, strided)
    triton_kernels.MAX_BLOCK = 32  # several blocks a row, the last one partly filled
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    layouts = ((False, False, 2), (True, False, 11), (True, True, 5))
    for dtype, temperatures, layout in itertools.product(dtypes, ((1.0,), (1.0, 2.5)), layouts):
        check(dtype, temperatures, *layout)
