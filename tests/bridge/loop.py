"""Train as `examples/bridge/train.py`, but in a loop of Megatron-core's parts: see `main`."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from nemo_kd.bridge import cpu
from nemo_kd.loss import KDSchedule

SEQ_LENGTH, MICRO_BATCH, GLOBAL_BATCH, STEPS, LR, SEED = 32, 2, 4, 6, 1e-3, 1234
ALPHA, ALPHA_END = 0.9, 0.4


def student(path: str) -> Any:
    """Build the model with Bridge's weights, wrapped for data parallelism."""
    from megatron.bridge.training.config import DistributedDataParallelConfig

    from nemo_kd.bridge.recipe import provider_of

    provider = provider_of(path)
    cpu.adapt_model(provider)
    provider.calculate_per_token_loss, provider.seq_length = True, SEQ_LENGTH
    provider.params_dtype, provider.bf16 = torch.float32, False
    provider.finalize()
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    provider.initialize_model_parallel(seed=0)
    return provider.provide_distributed_model(ddp_config=DistributedDataParallelConfig())


def main(path: str, train: str, held: str, *files: str) -> None:
    """Print one JSON line of losses per step, and one of the evaluation after the last step.

    `files`: SFT files, mixed with the store `train`.
    """
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.utils import get_model_config

    from nemo_kd.mcore import Source, StoreBatches, kd_forward_step
    from nemo_kd.mcore.dataset import KDDataset
    from nemo_kd.sft import open_files
    from nemo_kd.sft.config import RowConfig
    from nemo_kd.sft.reader import Model, open_rows
    from nemo_kd.sft.tokenizer import HFTokenizer
    from nemo_kd.store import Store

    model = student(path)
    get_model_config(model[0]).finalize_model_grads_func = finalize_model_grads
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=LR, min_lr=0.0, weight_decay=0.0, adam_beta2=0.98),
        model,
    )
    scheduler = OptimizerParamScheduler(
        optimizer, 0.0, LR, 0.0, 0, STEPS * GLOBAL_BATCH, "cosine", 0.0, 0.0, 1, "constant"
    )
    kd = KDSchedule(alpha=ALPHA, alpha_end=ALPHA_END)
    losses: list[dict[str, float]] = []
    store = Store(train)
    forward = kd_forward_step(kd, store.spec.vocab_size, progress=lambda: (len(losses), STEPS))
    sizes = {"seq_length": SEQ_LENGTH, "micro_batch_size": MICRO_BATCH}
    length = SEQ_LENGTH + 1
    by = Model(tokenizer=HFTokenizer(path), max_seq_length=length)
    rows = [open_rows(RowConfig(max_seq_length=length), open_files(file), by) for file in files]
    sources = [Source(store), *map(Source, rows)]
    batches = StoreBatches(sources, **sizes, global_batch_size=GLOBAL_BATCH, seed=SEED)

    def run(data: Any, number: int, forward_only: bool) -> dict[str, float]:
        reports = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=data,
            model=model,
            num_microbatches=number,
            forward_only=forward_only,
            **sizes,
        )
        sums = {name: sum(report[name].double() for report in reports) for name in reports[0]}
        return {name: float(total / count) for name, (total, count) in sums.items()}

    while len(losses) < STEPS:
        model[0].zero_grad_buffer()
        optimizer.zero_grad()
        losses.append(run(batches, GLOBAL_BATCH // MICRO_BATCH, forward_only=False))
        print(json.dumps(losses[-1]))
        optimizer.step()
        scheduler.step(increment=GLOBAL_BATCH)
    model[0].eval()
    data = KDDataset(Store(held), seq_length=SEQ_LENGTH, shuffle=False)
    items = [data.collate_fn([data[number]]) for number in range(len(data))]
    with torch.no_grad():
        print(json.dumps(run(iter(items), len(items), forward_only=True)))


if __name__ == "__main__":
    cpu.install()
    main(*sys.argv[1:])
