"""Check the loss on a device against its float64 reference.

    python -m benchmarks.gpu.checks cuda            # all cases
    python -m benchmarks.gpu.checks cuda small      # a few, for compute-sanitizer
    python -m benchmarks.gpu.checks cuda kernels    # Triton's kernels against torch's

Errors are relative to the largest value of the reference: at most a few roundings of the logits'
dtype in the gradient, float32's in the loss.
"""

from __future__ import annotations

import itertools
import runpy
import sys

import torch
from torch import Tensor

from nemo_kd.loss import KDConfig, TopK, linear_sft_kd_loss, reference, sft_kd_loss

SHAPES = ((5, 1031, 7), (33, 4096, 100), (3, 50_257, 100))
"""(N, V, K); an odd width, an aligned one, and several blocks of an odd one."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOSS_ERROR = 2e-5


def teacher_of(n: int, v: int, k: int, temperature: float, absent: bool) -> TopK:
    full = reference.topk(torch.randn(n, v, device=DEVICE) * 3, k, temperature)
    if absent:  # the last two ids of row 0
        full.ids[0, -2:] = -1
        full.logits[0, -2:] = -torch.inf
    return TopK(
        ids=full.ids,
        logits=full.logits.float(),
        logsumexp=full.logsumexp.float(),
        temperatures=(temperature,),
    )


def check(
    shape: tuple[int, int, int], dtype: torch.dtype, config: KDConfig, absent: bool, inplace: bool
) -> None:
    n, v, k = shape
    logits = (torch.randn(n, v, device=DEVICE) * 3).to(dtype)
    labels = torch.randint(v, (n,), device=DEVICE)
    teacher = teacher_of(n, v, k, config.temperature, absent)
    exact = logits.double().requires_grad_()
    expected = dense(exact, labels, teacher, config)
    expected.sum().backward()
    leaf = logits.clone().requires_grad_()
    loss = sft_kd_loss(leaf * 1, labels, teacher, config, inplace=inplace).loss
    loss.sum().backward()
    close("loss", loss, expected, LOSS_ERROR)
    close("gradient", leaf.grad, exact.grad, 2 * torch.finfo(dtype).eps + LOSS_ERROR)


def dense(z: Tensor, labels: Tensor, teacher: TopK, config: KDConfig) -> Tensor:
    """The reference's loss [N]; rows with absent ids one by one, with the ids that they have."""
    losses = []
    for n in range(len(z)):
        here = teacher.ids[n] >= 0
        row = TopK(
            ids=teacher.ids[n : n + 1, here],
            logits=teacher.logits[n : n + 1, here],
            logsumexp=teacher.logsumexp[n : n + 1],
            temperatures=teacher.temperatures,
        )
        losses.append(reference.sft_kd_loss(z[n : n + 1], labels[n : n + 1], row, config)[0])
    return torch.cat(losses)


def check_head(dtype: torch.dtype) -> None:
    """The fused head in chunks against the reference of float64 products."""
    n, v, k, h = 37, 1031, 7, 24
    hidden = torch.randn(n, h, device=DEVICE).to(dtype).requires_grad_()
    weight = (torch.randn(v, h, device=DEVICE) / 4).to(dtype).requires_grad_()
    labels = torch.randint(v, (n,), device=DEVICE)
    teacher = teacher_of(n, v, k, 1.0, False)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = dense(exact[0] @ exact[1].t(), labels, teacher, KDConfig())
    expected.sum().backward()
    loss = linear_sft_kd_loss(hidden, weight, labels, teacher, KDConfig(), chunk_tokens=10).loss
    loss.sum().backward()
    # The products round the logits, of which the loss depends on the largest.
    rounded = 8 * torch.finfo(dtype).eps + LOSS_ERROR
    close("loss of the fused head", loss, expected, rounded)
    close("gradient of hidden", hidden.grad, exact[0].grad, rounded)
    close("gradient of the weight", weight.grad, exact[1].grad, rounded)


def close(what: str, ours: Tensor | None, exact: Tensor | None, allowed: float) -> None:
    assert ours is not None and exact is not None
    error = float(
        (ours.detach().double() - exact.detach()).abs().max() / exact.detach().abs().max()
    )
    if not error <= allowed:
        raise AssertionError(f"{what}: relative error {error:.1e}, at most {allowed:.1e} allowed")


def main() -> None:
    small = sys.argv[2:] == ["small"]
    count = 0
    for shape, dtype in itertools.product(SHAPES[: 1 if small else None], DTYPES):
        for temperature, absent, inplace in itertools.product(
            (1.0, 2.0), (False, True), (False, True)
        ):
            if small and (absent, inplace) != (True, True):
                continue
            # The log-sum-exp outside the ids is exact only on `bucket`.
            check(shape, dtype, KDConfig(temperature=temperature), absent, inplace)
            count += 1
    for dtype in DTYPES:
        check_head(dtype)
        count += 1
    print(f"{count} cases agree with the float64 reference")


def kernels() -> None:
    torch.set_default_device(DEVICE)
    runpy.run_module("tests.loss.triton_checks", run_name="__main__")
    print("the Triton kernels agree with the torch ones")


if __name__ == "__main__":
    DEVICE = sys.argv[1]
    torch.manual_seed(0)
    (kernels if sys.argv[2:] == ["kernels"] else main)()
