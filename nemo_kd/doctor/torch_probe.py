"""Facts that torch knows about this machine, and the error of the loss; run as a process."""

from __future__ import annotations

import json
from typing import Any


def facts() -> dict[str, Any]:
    """CUDA version of the build, visible GPUs and NCCL version."""
    import torch

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    with_nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    return {
        "cuda": torch.version.cuda,
        "gpus": [
            f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}"
            for gpu in gpus
        ],
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if with_nccl else None,
    }


def loss_error(device: str) -> float:
    """Relative error of the loss and its gradient against the reference, K = 20, V = 1003.

    The largest difference divided by the largest value.
    """
    import torch

    from nemo_kd.loss import KDConfig, reference, sft_kd_loss, vocab_parallel_topk

    generator = torch.Generator().manual_seed(0)
    z, t = (4 * torch.randn(2, 64, 1003, generator=generator)).to(device)
    labels = torch.randint(1003, (64,), generator=generator).to(device)
    config = KDConfig(alpha=0.5)
    ours, exact = z.clone().requires_grad_(), z.double().requires_grad_()
    loss = sft_kd_loss(ours, labels, vocab_parallel_topk(t, 20), config).loss
    expected = reference.sft_kd_loss(exact, labels, reference.topk(t, 20), config)[0]
    loss.sum().backward()
    expected.sum().backward()
    pairs = ((loss.detach(), expected.detach()), (ours.grad, exact.grad))
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)


def main(device: str) -> None:
    """Print each finding as a line of JSON at once, so that a crash loses only the later ones."""
    if device == "cpu":
        print(json.dumps(facts()), flush=True)
    print(json.dumps({"loss_error": loss_error(device)}), flush=True)
