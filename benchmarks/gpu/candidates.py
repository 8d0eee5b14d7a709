"""The computations that `run` times: ours, and those of whatever other package is installed.

Each function returns {name: step}, or for a package that cannot be used {name: the reason}. A step
is forward + backward, except for top-K.

    python -m benchmarks.gpu.candidates cpu     # run each of them twice, with a small shape
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from nemo_kd.loss import KDConfig, TopK, kernels, linear_sft_kd_loss, sft_kd_loss, torch_kernels
from nemo_kd.loss.topk import vocab_parallel_topk

Step = Callable[[], object]
K = 100


def inputs(n: int, v: int, device: str) -> tuple[Tensor, TopK]:
    """labels [n] and a teacher with random ids."""
    labels = torch.randint(v, (n,), device=device)
    spacing = v // (4 * K)
    ids = torch.rand(n, 4 * K, device=device).argsort(-1)[:, :K] * spacing
    logits = torch.randn(n, K, device=device).sort(-1, descending=True).values
    return labels, TopK(ids=ids, logits=logits, logsumexp=torch.full((n,), 6.0, device=device))


def losses(n: int, v: int, device: str) -> dict[str, Step | str]:
    """SFT + KD on bf16 logits [n, v] and others' cross-entropy; logits may be overwritten."""
    leaf = torch.randn(n, v, device=device, dtype=torch.bfloat16).requires_grad_()
    labels, teacher = inputs(n, v, device)

    def step(loss: Callable[[Tensor], Tensor]) -> Step:
        def run() -> None:
            leaf.grad = None
            loss(leaf.view_as(leaf)).backward()  # not a leaf: its memory may be reused

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
        target = torch.full_like(z, -30.0, dtype=torch.float32)
        target = target.scatter_(1, teacher.ids, teacher.logits).log_softmax(-1)
        student = z.float().log_softmax(-1)
        kd = functional.kl_div(student, target, reduction="none", log_target=True).sum(-1)
        return 0.5 * functional.nll_loss(student, labels) + 0.5 * kd.mean()

    return {
        "ours": step(ours),
        "ours, two temperatures": step(two_temperatures),
        "ours, plain torch": in_torch,
        "PyTorch's cross-entropy, float32": step(
            lambda z: functional.cross_entropy(z.float(), labels)
        ),
        "dense KD + cross-entropy": step(dense),
        **optional("Megatron's cross-entropy", lambda: step(megatron(labels))),
        **optional("Liger's cross-entropy", lambda: step(liger(labels))),
    }


def megatron(labels: Tensor) -> Callable[[Tensor], Tensor]:
    import tempfile

    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    if not torch.distributed.is_initialized():
        store = torch.distributed.FileStore(tempfile.mkstemp()[1], 1)
        backend = "nccl" if labels.is_cuda else "gloo"
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    return lambda z: vocab_parallel_cross_entropy(z, labels).mean()


def liger(labels: Tensor) -> Callable[[Tensor], Tensor]:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    loss = LigerCrossEntropyLoss()
    return lambda z: loss(z * 1, labels)


def heads(n: int, v: int, h: int, device: str) -> dict[str, Step | str]:
    """LM head and loss of bf16 hidden [n, h]: gradients of hidden and weight."""
    hidden = torch.randn(n, h, device=device, dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(v, h, device=device, dtype=torch.bfloat16) / h**0.5).requires_grad_()
    labels, teacher = inputs(n, v, device)

    def step(loss: Callable[[], Tensor]) -> Step:
        def run() -> None:
            hidden.grad = weight.grad = None
            loss().backward()

        return run

    def fused() -> Tensor:
        result = linear_sft_kd_loss(
            hidden, weight, labels, teacher, KDConfig(), equal_gradients=True
        )
        return result.loss.mean()

    def separate() -> Tensor:
        z = functional.linear(hidden, weight)
        return sft_kd_loss(z, labels, teacher, KDConfig(), inplace=True).loss.mean()

    def liger_fused() -> Step:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss()
        return step(lambda: loss(weight, hidden, labels))

    return {
        "ours, fused": step(fused),
        "ours, separate": step(separate),
        **optional("Liger's fused cross-entropy", liger_fused),
    }


def topks(n: int, v: int, device: str) -> dict[str, Step | str]:
    """The teacher's top-K of bf16 logits [n, v]."""
    logits = torch.randn(n, v, device=device, dtype=torch.bfloat16)

    def plain() -> None:
        logits.topk(K, -1)
        logits.float().logsumexp(-1)

    return {"ours": lambda: vocab_parallel_topk(logits, K), "torch.topk + logsumexp": plain}


def optional(name: str, make: Callable[[], Any]) -> dict[str, Step | str]:
    """{name: the step, or why there is none}."""
    try:
        return {name: make()}
    except Exception as error:  # whatever another package's import raises
        return {name: f"{type(error).__name__}: {error}".splitlines()[0]}


def main(device: str) -> None:
    tables = (losses(8, 1000, device), heads(8, 1000, 16, device), topks(8, 1000, device))
    for table, steps in zip(("loss", "head", "top-K"), tables, strict=True):
        for name, step in steps.items():
            for _ in range(0 if isinstance(step, str) else 2):
                step()
            print(f"{name} ({table}): {step if isinstance(step, str) else 'done'}")


if __name__ == "__main__":
    main(sys.argv[1])
