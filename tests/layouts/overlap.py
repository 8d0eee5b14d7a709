"""The fused LM head under Megatron's overlapped all-gather of the parameters: `python … RESULT`.

A small GPTModel in DDP with a distributed optimizer and small buckets, trained with and without the
fused LM head. On a GPU the all-gathers run while the layers do; here it is seen who waits for them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from nemo_kd.nemo import start

STEPS, S, V, K = 3, 16, 64, 4


def main(result: str) -> None:
    start.install()
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    found: dict[str, Any] = {name: train(name == "fused") for name in ("separate", "fused")}
    found["deferred"] = [deferred(fused) for fused in (False, True)]
    Path(result).write_text(json.dumps(found))


def train(fused: bool) -> dict[str, Any]:
    """Train a few steps; return their losses, the all-gathers that nobody waited for, a weight."""
    import torch
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from nemo_kd.mcore.metrics import MetricSums
    from nemo_kd.nemo.config import KDTrainingConfig
    from nemo_kd.nemo.student_loss import StudentLoss
    from tests.mcore import small_gpt

    config = small_gpt.config_of()
    gpt = small_gpt.model(config, V, S)
    kd = KDTrainingConfig(alpha=0.5)
    loss_of = StudentLoss(kd, V, 0)
    loss_of.attach(gpt, fused)
    overlapped = DistributedDataParallelConfig(
        use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
    )
    overlapped.bucket_size = 2000
    model = DistributedDataParallel(config, overlapped, gpt)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(lr=1e-2, clip_grad=0.0, use_distributed_optimizer=True), [model]
    )
    losses, unfinished = [], 0
    for step in range(STEPS):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        tokens = torch.randint(V, (1, S + 1), generator=torch.Generator().manual_seed(step))
        loss_of.begin(kd, MetricSums(), training=True)
        loss_of.hand_over(answers(step))
        loss = model(
            input_ids=tokens[:, :-1],
            position_ids=torch.arange(S)[None],
            attention_mask=None,
            labels=tokens[:, 1:],
        ).mean()
        unfinished += sum(each.param_gather_handle is not None for each in model.bucket_groups)
        loss.backward()
        model.finish_grad_sync()
        optimizer.step()
        losses.append(float(loss))
    weight = gpt.output_layer.weight.detach().flatten().tolist()
    return {"losses": losses, "unfinished": unfinished, "weight": weight}


def deferred(fused: bool) -> str:
    """The error of a NeMo model that defers its embedding's gradient, or ""."""
    from omegaconf import OmegaConf

    from nemo_kd.errors import NemoKDError
    from nemo_kd.nemo.model import _refuse_unsupported

    cfg = {"mcore_gpt": True, "defer_embedding_wgrad_compute": True, "kd": {"fused_lm_head": fused}}
    try:
        _refuse_unsupported(OmegaConf.create(cfg))
    except NemoKDError as error:
        return str(error)
    return ""


def answers(step: int) -> Any:
    import numpy as np
    import torch

    from nemo_kd.data import answer_tokens
    from nemo_kd.topk import TopK

    random = np.random.default_rng(step)
    ids = np.stack([random.permutation(V)[:K] for _ in range(S)])
    logits = -np.sort(-random.normal(size=(S, K)).astype(np.float32))
    logsumexp = np.log(2 * np.exp(logits).sum(1)).astype(np.float32)
    return answer_tokens(torch.ones(1, S), [TopK(ids=ids, logits=logits, logsumexp=logsumexp)])


if __name__ == "__main__":
    main(*sys.argv[1:])
