"""A step under context parallelism, in Megatron's DDP and schedule: `torchrun … DIRECTORY`.

The processes are one context-parallel group. All but the attention, which a CPU has not for cut
sequences: logits are a table of the tokens. Rank 0 prints, as JSON, the gradients of the table with
and without `calculate_per_token_loss`, and the sums of the reports over micro-batches and ranks.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from nemo_kd.mcore import cpu

cpu.install()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.distributed.finalize_model_grads import finalize_model_grads  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.module import MegatronModule  # noqa: E402

from nemo_kd.loss import KDConfig  # noqa: E402
from nemo_kd.mcore import StoreBatches, kd_forward_step  # noqa: E402
from nemo_kd.store import Store  # noqa: E402
from tests.store.samples import sample, spec, write  # noqa: E402

VOCABULARY, LENGTH = 29, 32
ANSWERS = (3, 9, 20, 0)  # of samples of one micro-batch each: in the first chunk, in most, in none


class Table(MegatronModule):
    """logits [S, B, V] = table[tokens]."""

    model_type = ModelType.encoder_or_decoder
    post_process = True
    share_embeddings_and_output_weights = False

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        torch.manual_seed(0)
        self.table = torch.nn.Parameter(torch.randn(VOCABULARY, VOCABULARY))

    def set_input_tensor(self, _: Any) -> None: ...

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **_: Any) -> torch.Tensor:
        return self.compute_language_model_loss(labels, self.table[input_ids.t()])

    def compute_language_model_loss(self, labels: Any, logits: Any) -> torch.Tensor:
        raise AssertionError("Megatron's own cross-entropy has no part in these")


def step(store: Store, per_token: bool, ranks: int) -> tuple[list[float], dict[str, list[float]]]:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=1,
        context_parallel_size=ranks,
        calculate_per_token_loss=per_token,
        use_cpu_initialization=True,
        finalize_model_grads_func=finalize_model_grads,
    )
    model = DistributedDataParallel(config, DistributedDataParallelConfig(), Table(config))
    reports = get_forward_backward_func()(
        forward_step_func=kd_forward_step(KDConfig(), VOCABULARY),
        data_iterator=StoreBatches(
            store, seq_length=LENGTH, micro_batch_size=1, global_batch_size=len(ANSWERS)
        ),
        model=model,
        num_microbatches=len(ANSWERS),
        seq_length=LENGTH,
        micro_batch_size=1,
        forward_only=False,
    )
    sums = {name: sum(report[name] for report in reports) for name in reports[0]}
    for term in sums.values():
        torch.distributed.all_reduce(term)
    gradient = model.module.table.main_grad.flatten().tolist()
    return gradient, {name: term.tolist() for name, term in sums.items()}


def main(directory: Path) -> None:
    rank, ranks = (int(os.environ.get(*pair)) for pair in (("RANK", 0), ("WORLD_SIZE", 1)))
    file = f"file://{directory}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=file, rank=rank, world_size=ranks)
    parallel_state.initialize_model_parallel(context_parallel_size=ranks)
    of = spec(vocab_size=VOCABULARY)
    path = directory / "store"
    if rank == 0:
        write(path, of, [sample(n, of, a, prompt=4) for n, a in enumerate(ANSWERS)])
    torch.distributed.barrier()
    found = {str(kind): step(Store(path), kind, ranks) for kind in (True, False)}
    if rank == 0:
        print(json.dumps(found), flush=True)
    torch.distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
