# mypy: disable-error-code="import-untyped,untyped-decorator,no-untyped-def"
"""The two passes over a vocabulary shard as Triton kernels: the same functions as `torch_kernels`.

One program a row. Forward: one read (online maximum and sum, gather); backward: one read, one
write, scatter. Only imported where Triton is; `kernels.choose` decides.

Loads and stores of 128 bits need a mask that is the same for their elements. So columns are masked
by `width`, a multiple of 16 in any sharded model, and only then, in registers, by `valid`, which
is odd wherever a vocabulary is padded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemo_kd.loss.rows import Rows
from nemo_kd.loss.shard import VocabShard
from nemo_kd.loss.torch_kernels import ShardPass

MAX_BLOCK = 4096
VECTOR_BYTES = 16
"""Size of the largest load of a thread."""
ALIGNMENT = 16
"""What Triton wants addresses (bytes), strides and widths (columns) to be multiples of for it."""
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_LOG2_E = tl.constexpr(math.log2(math.e))


def keeps_softmax(dtype: torch.dtype, temperatures: Sequence[float]) -> bool:
    """Return False: on a GPU an exponential costs less than writing the logits twice."""
    return False


def forward(
    logits: Rows,
    ids: Tensor,
    shard: VocabShard,
    temperatures: Sequence[float],
    keep: bool = False,
) -> ShardPass:
    """As `torch_kernels.forward`, in float32, for one or two temperatures; `keep` is never true.

    While a row is summed, its gathered logits are -inf in memory, and restored afterwards: no other
    stream may read the logits meanwhile.
    """
    rows, gathered = ids.shape
    picked = torch.empty(rows, gathered, dtype=torch.float32, device=ids.device)
    top = picked.new_empty(rows)
    sums = picked.new_empty(len(temperatures), rows)
    _launch(
        _forward_kernel,
        logits,
        ids,
        shard,
        temperatures,
        picked,
        top,
        sums,
    )
    # A row has a sum of at least exp(0) or none at all, and then a share of 0.
    return ShardPass(picked, top, list(sums.log()), list(sums.clamp_min(1.0)))


def backward(
    logits: Rows,
    ids: Tensor,
    shard: VocabShard,
    temperatures: Sequence[float],
    top: Tensor,
    grad_picked: Tensor | None,
    coefficients: Sequence[Tensor | None],
    out: Rows,
    softmax_kept: bool = False,
) -> None:
    """As `torch_kernels.backward`; `softmax_kept` is never true."""
    grad = torch.zeros_like(ids, dtype=torch.float32) if grad_picked is None else grad_picked
    nothing = torch.zeros_like(top)
    packed = torch.stack([nothing if c is None else c for c in coefficients])  # [T, N]
    _launch(
        _backward_kernel,
        logits,
        ids,
        shard,
        temperatures,
        grad.contiguous(),
        top,
        packed,
        out.matrix,
        out.matrix.stride(0),
    )
    out.clear_others()


def _launch(
    kernel: Any,
    logits: Rows,
    ids: Tensor,
    shard: VocabShard,
    temperatures: Sequence[float],
    *rest: Any,
) -> None:
    if len(temperatures) > 2:
        raise ValueError(f"{len(temperatures)} temperatures: the kernels take one or two.")
    if len(ids) == 0:
        return
    matrix = logits.matrix
    vector = VECTOR_BYTES // matrix.element_size()
    sizes = (matrix.data_ptr(), matrix.stride(0), shard.width)
    aligned = all(size % ALIGNMENT == 0 for size in sizes)
    block = MAX_BLOCK if aligned else MAX_BLOCK // 2  # loads one by one keep more addresses
    device = matrix.device.index if matrix.is_cuda else -1
    with torch.cuda.device(device):
        kernel[(len(ids),)](
            matrix,
            matrix.stride(0),
            ids if logits.index is None else logits.index,
            ids.contiguous(),
            ids.shape[1],
            shard.start,
            shard.valid,
            shard.width,
            1 / temperatures[0],
            1 / temperatures[-1],
            *rest,
            INDEXED=logits.index is not None,
            TWO=len(temperatures) == 2,
            BLOCK_M=triton.next_power_of_2(ids.shape[1]),
            BLOCK=max(vector, min(block, triton.next_power_of_2(shard.width))),
            VECTOR=vector,
            ALIGNED=aligned,
            num_warps=8,
        )


@triton.jit
def _forward_kernel(
    matrix,
    stride,
    index,
    ids,
    gathered,
    start,
    valid,
    width,
    scale_a,
    scale_b,
    picked,
    top,
    sums,
    INDEXED: tl.constexpr,
    TWO: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """picked, top, sums[0] = Σ exp((z - top) scale_a), sums[1] with scale_b if TWO; of one row."""
    n = tl.program_id(0).to(tl.int64)
    row = matrix + (tl.load(index + n) if INDEXED else n) * stride
    m = tl.arange(0, BLOCK_M)
    column = tl.load(ids + n * gathered + m, mask=m < gathered, other=-1) - start
    here = (column >= 0) & (column < valid) & (m < gathered)
    original = tl.load(row + column, mask=here, other=0.0)
    tl.store(picked + n * gathered + m, original.to(tl.float32), mask=m < gathered)
    # Barriers: all threads read before any of them writes, and write before any reads again.
    tl.debug_barrier()
    absent = tl.full([BLOCK_M], -float("inf"), tl.float32).to(original.dtype)
    tl.store(row + column, absent, mask=here)
    tl.debug_barrier()
    # Each lane has its own maximum and sums, of VECTOR columns at a time: no barrier in the loop.
    # They are neighbours where that makes one load, else apart, so that neighbouring lanes' are.
    LANES: tl.constexpr = BLOCK // VECTOR
    rate_a = scale_a * _LOG2_E
    rate_b = scale_b * _LOG2_E
    largest = tl.full([LANES], _LOWEST, tl.float32)
    sum_a = tl.zeros([LANES], tl.float32)
    sum_b = tl.zeros([LANES], tl.float32)
    lane = tl.arange(0, LANES)[:, None]
    part = tl.arange(0, VECTOR)[None, :]
    offset = lane * VECTOR + part if ALIGNED else lane + part * LANES
    for first in range(0, width, BLOCK):
        v = first + offset
        z = tl.load(row + v, mask=v < width, other=-float("inf")).to(tl.float32)
        z = tl.where(v < valid, z, -float("inf"))
        larger = tl.maximum(largest, tl.max(z, 1))
        shifted = z - larger[:, None]
        sum_a = sum_a * tl.exp2((largest - larger) * rate_a) + tl.sum(tl.exp2(shifted * rate_a), 1)
        if TWO:
            sum_b *= tl.exp2((largest - larger) * rate_b)
            sum_b += tl.sum(tl.exp2(shifted * rate_b), 1)
        largest = larger
    highest = tl.max(largest, 0)
    tl.debug_barrier()
    tl.store(row + column, original, mask=here)
    tl.store(top + n, tl.where(highest == _LOWEST, -float("inf"), highest))
    shifts = largest - highest
    tl.store(sums + n, tl.sum(sum_a * tl.exp2(shifts * rate_a), 0))
    if TWO:
        tl.store(sums + tl.num_programs(0) + n, tl.sum(sum_b * tl.exp2(shifts * rate_b), 0))


@triton.jit
def _backward_kernel(
    matrix,
    stride,
    index,
    ids,
    gathered,
    start,
    valid,
    width,
    scale_a,
    scale_b,
    grad_picked,
    top,
    coefficients,
    out,
    out_stride,
    INDEXED: tl.constexpr,
    TWO: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """out = Σ coefficient · exp((z - top) scale), then grad_picked at the ids; of one row."""
    n = tl.program_id(0).to(tl.int64)
    source = tl.load(index + n) if INDEXED else n
    row = matrix + source * stride
    to = out + source * out_stride
    largest = tl.load(top + n)
    factor_a = tl.load(coefficients + n)
    factor_b = tl.load(coefficients + tl.num_programs(0) + n) if TWO else 0.0
    rate_a = scale_a * _LOG2_E
    rate_b = scale_b * _LOG2_E
    for first in range(0, width, BLOCK):
        v = first + tl.arange(0, BLOCK)
        z = tl.load(row + v, mask=v < width, other=-float("inf")).to(tl.float32)
        # Where nothing is outside, top is -inf and everything here an id or padding.
        shifted = tl.where(v < valid, z - tl.maximum(largest, _LOWEST), -float("inf"))
        grad = factor_a * tl.exp2(shifted * rate_a)
        if TWO:
            grad += factor_b * tl.exp2(shifted * rate_b)
        tl.store(to + v, grad.to(out.dtype.element_ty), mask=v < width)
    tl.debug_barrier()
    # The ids are not among the sums: their own gradient replaces the value written above. A
    # repeated id stores the sum of its gradients each time.
    m = tl.arange(0, BLOCK_M)
    own = tl.load(ids + n * gathered + m, mask=m < gathered, other=-1)
    total = tl.zeros([BLOCK_M], tl.float32)
    for j in range(0, gathered):
        grad_j = tl.load(grad_picked + n * gathered + j)
        total += tl.where(own == tl.load(ids + n * gathered + j), grad_j, 0.0)
    column = own - start
    here = (column >= 0) & (column < valid) & (m < gathered)
    tl.store(to + column, total.to(out.dtype.element_ty), mask=here)
