"""Distil from a store with Megatron-core only: GPTModel, its schedules and its optimizer.

    python examples/megatron_core/train.py --store store --steps 20
    torchrun --nproc_per_node=2 examples/megatron_core/train.py --store store --tensor-parallel 2

The student starts from random weights. Distillation takes two names of `nemo_kd.mcore`,
`KDBatches` and `kd_forward_step`; everything else is an ordinary Megatron-core program.
"""

from __future__ import annotations

import argparse
import os
import warnings
from typing import Any

import torch

from nemo_kd.cli.failures import reported
from nemo_kd.cli.option_types import count, positive
from nemo_kd.mcore import cpu

DECIMALS = 5
"""Decimals of the printed losses."""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", required=True, help="store of a teacher")
    parser.add_argument("--alpha", type=float, default=0.9, help="weight of the distillation")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--steps", type=count, default=100)
    parser.add_argument("--global-batch-size", type=count, default=8)
    parser.add_argument("--micro-batch-size", type=count, default=2)
    parser.add_argument("--seq-length", type=count, default=128)
    parser.add_argument("--layers", type=count, default=4)
    parser.add_argument("--hidden-size", type=count, default=64)
    parser.add_argument("--heads", type=count, default=4)
    parser.add_argument("--lr", type=positive, default=1e-3)
    parser.add_argument("--tensor-parallel", type=count, default=1)
    parser.add_argument("--pipeline-parallel", type=count, default=1)
    parser.add_argument(
        "--virtual-pipeline", type=count, default=1, help="model chunks per pipeline stage"
    )
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--seed", type=int, default=1234)
    return parser


def start(args: argparse.Namespace) -> None:
    """Create process groups, from torchrun's variables or for a single process."""
    from megatron.core import parallel_state, tensor_parallel

    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29511")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    interleaved = args.virtual_pipeline if args.virtual_pipeline > 1 else None
    parallel_state.initialize_model_parallel(
        args.tensor_parallel, args.pipeline_parallel, interleaved
    )
    tensor_parallel.model_parallel_cuda_manual_seed(args.seed)


def student(args: argparse.Namespace, vocab_size: int) -> list[Any]:
    """Build a small Llama-like GPTModel, wrapped for data parallelism.

    Return this rank's model chunks: one, or several with a virtual pipeline.
    """
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    interleaves = args.virtual_pipeline > 1
    config = TransformerConfig(
        num_layers=args.layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.heads,
        ffn_hidden_size=2 * args.hidden_size,
        tensor_model_parallel_size=args.tensor_parallel,
        pipeline_model_parallel_size=args.pipeline_parallel,
        sequence_parallel=args.sequence_parallel,
        virtual_pipeline_model_parallel_size=args.virtual_pipeline if interleaves else None,
        # Batched, messages in both directions between the same two stages would be mixed up.
        overlap_p2p_comm=interleaves,
        batch_p2p_comm=not interleaves,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=not torch.cuda.is_available(),
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        calculate_per_token_loss=True,  # equal weight for every answer token
        finalize_model_grads_func=finalize_model_grads,
    )
    torch.manual_seed(args.seed)
    multiple = 8 * args.tensor_parallel
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=False)
    parts: list[Any] = []
    for part in range(args.virtual_pipeline):
        stage = {"vp_stage": part} if interleaves else {}
        where = {"ignore_virtual": not interleaves, **stage}
        gpt = GPTModel(
            config,
            get_gpt_layer_local_spec(normalization="RMSNorm"),
            vocab_size=-(-vocab_size // multiple) * multiple,
            max_sequence_length=args.seq_length,
            pre_process=parallel_state.is_pipeline_first_stage(**where),
            post_process=parallel_state.is_pipeline_last_stage(**where),
            parallel_output=True,
            position_embedding_type="rope",
            **stage,
        ).to(torch.cuda.current_device())
        # Only the first chunk's gradients are reduced during the backward pass.
        parts.append(DistributedDataParallel(config, ddp, gpt, disable_bucketing=part > 0))
    return parts


def main() -> None:
    args = parser().parse_args()
    # Without apex, Megatron warns about its fallbacks many times.
    for module in ("megatron", "torch.distributed"):
        warnings.filterwarnings("ignore", module=module)
    cpu.install()
    from megatron.core import parallel_state
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from nemo_kd.loss import KDConfig
    from nemo_kd.mcore import KDBatches, KDDataset, kd_forward_step
    from nemo_kd.store import Store

    start(args)
    store = Store(args.store)
    config = KDConfig(alpha=args.alpha, temperature=args.temperature)
    dataset = KDDataset(
        store, seq_length=args.seq_length, temperature=args.temperature, seed=args.seed
    )
    dataset.check(config)
    vocab_size = store.spec.vocab_size
    model = student(args, vocab_size)
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=args.lr, clip_grad=1.0), model)
    # Each model chunk reads the micro-batches through its own iterator.
    batches = [
        iter(
            KDBatches(
                dataset,
                micro_batch_size=args.micro_batch_size,
                global_batch_size=args.global_batch_size,
            )
        )
        for _ in model
    ]
    step = kd_forward_step(config, vocab_size)
    replicas = parallel_state.get_data_parallel_world_size()
    for number in range(1, args.steps + 1):
        for part in model:
            part.zero_grad_buffer()
        optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=batches if len(model) > 1 else batches[0],
            model=model,
            num_microbatches=args.global_batch_size // (args.micro_batch_size * replicas),
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            forward_only=False,
        )
        optimizer.step()
        show(number, reports)
    torch.distributed.destroy_process_group()


def show(number: int, reports: list[dict[str, torch.Tensor]]) -> None:
    """Print means over the answer tokens of the global batch, on the rank that has them."""
    from megatron.core import parallel_state

    if not parallel_state.is_pipeline_last_stage():
        return
    sums = {
        name: torch.stack([report[name].double() for report in reports]).sum(0)
        for name in reports[0]
    }
    for value in sums.values():  # [sum, number of answer tokens]
        torch.distributed.all_reduce(value, group=parallel_state.get_data_parallel_group())
    if parallel_state.get_data_parallel_rank() or parallel_state.get_tensor_model_parallel_rank():
        return
    means = ", ".join(f"{name} {float(a / b):.{DECIMALS}f}" for name, (a, b) in sums.items())
    print(f"step {number}: {means}", flush=True)


if __name__ == "__main__":
    with reported():
        main()
