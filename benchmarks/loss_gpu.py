"""Compare the loss on one GPU: Triton kernels, torch passes, cross-entropy alone, dense KD.

    python benchmarks/loss_gpu.py

Needs CUDA and Triton. Measures forward + backward: the median of `triton.testing.do_bench`, and the
peak of memory allocated in addition to the logits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from nemo_kd.loss import KDConfig, TopK, kernels, sft_kd_loss, torch_kernels

SHAPES = ((4096, 49_152), (4096, 128_256), (2048, 262_144))
K = 100


def candidates(n: int, v: int, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    functional = torch.nn.functional
    leaf = torch.randn(n, v, device="cuda", dtype=dtype).requires_grad_()
    labels = torch.randint(v, (n,), device="cuda")
    ids = torch.rand(n, 4 * K, device="cuda").argsort(-1)[:, :K] * (v // (4 * K))
    logits = torch.randn(n, K, device="cuda").sort(-1, descending=True).values
    teacher = TopK(ids=ids, logits=logits, logsumexp=torch.full((n,), 6.0, device="cuda"))

    def ours() -> None:
        leaf.grad = None
        sft_kd_loss(leaf * 1, labels, teacher, KDConfig(), inplace=True).loss.mean().backward()

    def torchs() -> None:
        with mock.patch.object(kernels, "choose", lambda _: torch_kernels):
            ours()

    def cross_entropy() -> None:
        leaf.grad = None
        functional.cross_entropy((leaf * 1).float(), labels).backward()

    def dense() -> None:
        leaf.grad = None
        z = (leaf * 1).float()
        target = torch.full_like(z, -30.0).scatter_(1, ids, logits).log_softmax(-1)
        student = z.log_softmax(-1)
        kd = functional.kl_div(student, target, reduction="none", log_target=True).sum(-1)
        (0.5 * functional.cross_entropy(z, labels) + 0.5 * kd.mean()).backward()

    return {"Triton": ours, "torch": torchs, "cross-entropy alone": cross_entropy, "dense": dense}


def main() -> None:
    if not torch.cuda.is_available() or not kernels._triton_is_installed():
        sys.exit(
            "error: this benchmark needs a CUDA GPU and Triton; benchmarks/loss.py runs on a CPU"
        )
    from triton.testing import do_bench

    table = Table(title=f"SFT + KD loss on {torch.cuda.get_device_name()}, K = {K}")
    for column in ("N, V", "dtype", "", "ms", "MB"):
        table.add_column(column, justify="right")
    for n, v in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            for name, step in candidates(n, v, dtype).items():
                step()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                step()
                peak = (torch.cuda.max_memory_allocated() - before) / 1e6
                shown = str(dtype).removeprefix("torch.")
                table.add_row(f"{n}, {v}", shown, name, f"{do_bench(step):.2f}", f"{peak:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
