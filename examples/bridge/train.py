"""Distil a Hugging Face student from stores in Megatron-Bridge, and export it.

    torchrun --nproc_per_node=8 examples/bridge/train.py student/ --store store --output run \\
        --tensor-parallel 2 --export run/student
    python examples/bridge/train.py student/ --store store --valid heldout --output run

Needs Megatron-Bridge, as in the NeMo containers from 25.11 on: nvcr.io/nvidia/nemo:26.02 and later
have nothing to install but nemo-kd. The same command continues from the last checkpoint. Everything
that is not an option here is a field of Bridge's `ConfigContainer`: change `config` below.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nemo_kd.bridge import cpu
from nemo_kd.cli.failures import reported
from nemo_kd.cli.option_types import count, count_or_zero, positive
from nemo_kd.loss import SUPPORTS


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("student", help="Hugging Face directory")
    parser.add_argument("--store", nargs="+", required=True, help="one or several stores")
    parser.add_argument(
        "--sft-file", nargs="+", default=[], help="SFT files, trained with cross-entropy only"
    )
    parser.add_argument("--valid", nargs="+", default=[], help="stores to evaluate on")
    parser.add_argument("--output", required=True, help="directory of the run")
    parser.add_argument("--export", help="write the trained student as a Hugging Face directory")
    parser.add_argument("--alpha", type=float, default=0.9, help="weight of the distillation")
    parser.add_argument("--alpha-end", type=float, help="its value at the last step")
    parser.add_argument("--temperature", type=positive, default=1.0)
    parser.add_argument("--support", choices=SUPPORTS, default="bucket")
    parser.add_argument("--steps", type=count, default=1000)
    parser.add_argument("--stop-at", type=count, help="leave after this step, as a time limit does")
    parser.add_argument("--global-batch-size", type=count, default=32)
    parser.add_argument("--micro-batch-size", type=count, default=1)
    parser.add_argument("--seq-length", type=count, default=2048)
    parser.add_argument("--over-long", choices=("error", "truncate", "drop"), default="error")
    parser.add_argument("--packed", action="store_true", help="train on packs of samples")
    parser.add_argument("--lr", type=positive, default=1e-5)
    parser.add_argument("--warmup", type=count_or_zero, default=50, help="steps of warm-up")
    parser.add_argument("--lora", type=count, metavar="RANK", help="train adapters of this rank")
    parser.add_argument("--eval-interval", type=count, default=100)
    parser.add_argument("--save-interval", type=count, default=100)
    parser.add_argument("--tensor-parallel", type=count, default=1)
    parser.add_argument("--pipeline-parallel", type=count, default=1)
    parser.add_argument("--virtual-pipeline", type=count, help="model chunks per pipeline stage")
    parser.add_argument("--context-parallel", type=count, default=1)
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--precision", default="bf16_mixed", help="of Bridge, or 32")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument(
        "--allow", nargs="+", default=[], help="settings that may differ from the checkpoint's"
    )
    return parser


def settings(args: argparse.Namespace) -> Any:
    from megatron.bridge.peft.lora import LoRA

    from nemo_kd.bridge import KDSource, finetune_config

    config = finetune_config(
        args.student,
        [*args.store, *(KDSource(file=file) for file in args.sft_file)],
        valid=args.valid,
        output=args.output,
        seq_length=args.seq_length,
        temperature=args.temperature,
        micro_batch_size=args.micro_batch_size,
        global_batch_size=args.global_batch_size,
        train_iters=args.steps,
        lr=args.lr,
        lr_warmup_iters=args.warmup,
        eval_interval=args.eval_interval,
        save_interval=args.save_interval,
        tensor_model_parallel_size=args.tensor_parallel,
        pipeline_model_parallel_size=args.pipeline_parallel,
        virtual_pipeline_model_parallel_size=args.virtual_pipeline,
        context_parallel_size=args.context_parallel,
        sequence_parallel=args.sequence_parallel,
        precision=None if args.precision == "32" else args.precision,
        seed=args.seed,
    )
    config.dataset.over_long, config.dataset.packed = args.over_long, args.packed
    config.train.exit_interval = args.stop_at
    if args.lora is not None:
        config.peft = LoRA(dim=args.lora, alpha=args.lora)
    return config


def main() -> None:
    args = parser().parse_args()
    cpu.install()
    from nemo_kd.bridge import finetune
    from nemo_kd.bridge.export import check_export
    from nemo_kd.loss import KDSchedule

    if args.export:
        check_export(args.export, [args.student, *args.store, checkpoints(args)])

    kd = KDSchedule(
        alpha=args.alpha,
        alpha_end=args.alpha_end,
        temperature=args.temperature,
        support=args.support,
    )
    config = settings(args)
    finetune(config, kd, allow=args.allow)
    if args.export:
        export(args, config.peft)


def export(args: argparse.Namespace, peft: Any) -> None:
    """Write the last checkpoint as a Hugging Face directory, by Bridge, on the first rank."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.utils.common_utils import get_rank_safe

    from nemo_kd.bridge import export_merged
    from nemo_kd.bridge.export import new_export

    if get_rank_safe() != 0:
        return
    if peft is not None:
        export_merged(args.student, checkpoints(args), args.export, peft)
        return
    bridge = AutoBridge.from_hf_pretrained(
        args.student, local_files_only=True, trust_remote_code=False
    )
    with new_export(args.export, args.student, checkpoints(args)) as new:
        bridge.export_ckpt(checkpoints(args), str(new))


def checkpoints(args: argparse.Namespace) -> str:
    return str(Path(args.output, "checkpoints"))


if __name__ == "__main__":
    with reported():
        main()
