"""The computations that are timed: ours, and those of whatever other package is installed.

Each function returns {name: step}, or for a package that cannot be used {name: the reason}. A step
is forward + backward, except for the teacher's top-K.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.others import Steps, dense_teacher, of_hidden, of_logits, optional
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.timing import Row, Step, milliseconds, timed
from nemo_kd.loss import KDConfig, TopK, kernels, linear_sft_kd_loss, sft_kd_loss, torch_kernels
from nemo_kd.loss.topk import vocab_parallel_topk


def inputs(n: int, v: int, k: int, device: str) -> tuple[Tensor, TopK]:
    """labels [n] and a teacher with random ids."""
    labels = torch.randint(v, (n,), device=device)
    spacing = v // (4 * k)
    ids = torch.rand(n, 4 * k, device=device).argsort(-1)[:, :k] * spacing
    logits = torch.randn(n, k, device=device).sort(-1, descending=True).values
    return labels, TopK(ids=ids, logits=logits, logsumexp=torch.full((n,), 6.0, device=device))


def losses(n: int, v: int, k: int, device: str) -> Steps:
    """SFT + KD on bf16 logits [n, v] and others' losses; logits may be overwritten."""
    leaf = torch.randn(n, v, device=device, dtype=torch.bfloat16).requires_grad_()
    labels, teacher = inputs(n, v, k, device)

    def step(loss: Callable[[Tensor], Tensor]) -> Step:
        def run() -> None:
            loss(leaf.view_as(leaf)).backward()  # not a leaf: its memory may be reused
            leaf.grad = None  # part of the step's memory

        return run

    def ours(z: Tensor) -> Tensor:
        return sft_kd_loss(z, labels, teacher, KDConfig(), inplace=True).loss.mean()

    def two_temperatures(z: Tensor) -> Tensor:
        config = KDConfig(temperature=2.0)
        at_two = TopK(
            ids=teacher.ids,
            logits=teacher.logits,
            logsumexp=teacher.logsumexp,
            temperatures=(2.0,),
        )
        return sft_kd_loss(z, labels, at_two, config, inplace=True).loss.mean()

    def in_torch() -> None:
        with mock.patch.object(kernels, "choose", lambda _: torch_kernels):
            step(ours)()

    def dense(z: Tensor) -> Tensor:
        target = dense_teacher(teacher, z)
        student = z.float().log_softmax(-1)
        kd = functional.kl_div(student, target, reduction="none", log_target=True).sum(-1)
        return 0.5 * functional.nll_loss(student, labels) + 0.5 * kd.mean()

    found: Steps = {
        "ours": step(ours),
        "ours, two temperatures": step(two_temperatures),
        "ours, plain torch": in_torch,
        "PyTorch's cross-entropy, float32": step(
            lambda z: functional.cross_entropy(z.float(), labels)
        ),
        "dense KD + cross-entropy": step(dense),
    }
    for name, make in of_logits(labels, teacher).items():
        found |= optional(name, lambda make=make: step(make()))
    return found


def heads(n: int, v: int, h: int, k: int, device: str) -> Steps:
    """LM head and loss of bf16 hidden [n, h]: gradients of hidden and weight."""
    hidden = torch.randn(n, h, device=device, dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(v, h, device=device, dtype=torch.bfloat16) / h**0.5).requires_grad_()
    labels, teacher = inputs(n, v, k, device)

    def step(loss: Callable[[], Tensor]) -> Step:
        def run() -> None:
            loss().backward()
            hidden.grad = weight.grad = None  # part of the step's memory

        return run

    def fused() -> Tensor:
        result = linear_sft_kd_loss(
            hidden, weight, labels, teacher, KDConfig(), equal_gradients=True
        )
        return result.loss.mean()

    def separate() -> Tensor:
        z = functional.linear(hidden, weight)
        return sft_kd_loss(z, labels, teacher, KDConfig(), inplace=True).loss.mean()

    def cross_entropy() -> Tensor:
        return functional.cross_entropy(functional.linear(hidden, weight).float(), labels)

    found: Steps = {
        "ours, fused": step(fused),
        "ours, separate": step(separate),
        "linear + PyTorch's cross-entropy, float32": step(cross_entropy),
    }
    for name, make in of_hidden(hidden, weight, labels).items():
        found |= optional(name, lambda make=make: step(make()))
    return found


def topks(n: int, v: int, k: int, device: str) -> Steps:
    """The teacher's top-K and sampling of bf16 logits [n, v]."""
    logits = torch.randn(n, v, device=device, dtype=torch.bfloat16)

    def plain() -> None:
        logits.topk(k, -1)
        logits.float().logsumexp(-1)

    def sampling() -> Step:
        from nemo_kd.teacher.sampling import vocab_parallel_sample

        uniform = torch.rand(n, dtype=torch.float64, device=device)

        def run() -> None:  # in pieces: it needs 8 bytes per logit, several times
            for part, numbers in zip(logits.split(1024), uniform.split(1024), strict=True):
                vocab_parallel_sample(part, k, numbers)

        return run

    return {
        "ours": lambda: vocab_parallel_topk(logits, k),
        "ours, two temperatures": lambda: vocab_parallel_topk(logits, k, temperatures=(1.0, 2.0)),
        "torch.topk + logsumexp": plain,
        **optional("ours, sampling", sampling),
    }


def loss(sizes: Sizes) -> Iterator[Row]:
    """Times of the losses, and what share of a copy's bandwidth ours reach."""
    from benchmarks.gpu.predict import loss_bytes

    bandwidth = copy_bandwidth(sizes)
    yield {"what": f"copy of {sizes.copied:,} bytes", "TB/s": round(bandwidth / 1e12, 2)}
    for n, v in sizes.losses:
        make = partial(losses, n, v, sizes.k, sizes.device)
        for row in timed(make, f"({n:,}, {v:,})", sizes.device):
            if row["what"] in ("ours", "ours, two temperatures") and "ms" in row:
                moved = n * loss_bytes(v)
                row["of the copy's bandwidth"] = round(moved / row["ms"] * 1e3 / bandwidth, 2)
            yield row


def head(sizes: Sizes) -> Iterator[Row]:
    for n, v, h in sizes.heads:
        make = partial(heads, n, v, h, sizes.k, sizes.device)
        yield from timed(make, f"({n:,}, {v:,}, {h:,})", sizes.device)


def topk(sizes: Sizes) -> Iterator[Row]:
    for n, v in sizes.topks:
        make = partial(topks, n, v, sizes.k, sizes.device)
        yield from timed(make, f"({n:,}, {v:,})", sizes.device)


def copy_bandwidth(sizes: Sizes) -> float:
    """Bytes read and written per second by a copy."""
    source = torch.empty(sizes.copied, dtype=torch.uint8, device=sizes.device)
    target = torch.empty_like(source)
    ms = milliseconds(lambda: target.copy_(source), sizes.device)
    return 2 * sizes.copied / (max(ms, 1e-3) / 1e3)
