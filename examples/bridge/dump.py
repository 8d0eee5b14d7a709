"""Store the top-K logits of a teacher that Megatron-Bridge loads from a Hugging Face directory.

    torchrun --nproc_per_node=8 examples/bridge/dump.py teacher/ --data train.jsonl \\
        --output store --tensor-parallel 8

Needs Megatron-Bridge, as in the NeMo containers from 25.11 on. Interrupted, the same command
continues. The store is the same kind as of every other dump: any of nemo-kd's trainings reads it.
"""

from __future__ import annotations

import argparse

from nemo_kd.bridge import cpu
from nemo_kd.cli.failures import reported
from nemo_kd.teacher.config import (
    DataConfig,
    DumpConfig,
    TeacherConfig,
    TeacherModelConfig,
    TopKConfig,
    TrainerConfig,
)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher", help="Hugging Face directory")
    parser.add_argument("--data", nargs="+", required=True, help="SFT files")
    parser.add_argument("--output", required=True, help="directory of the store")
    parser.add_argument("--top-k", type=int, default=100)
    parser.add_argument("--max-seq-length", type=int, default=2048)
    parser.add_argument("--prompt-template", default="{input} {output}", help="of rows with fields")
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--pipeline-parallel", type=int, default=1)
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--precision", choices=("bf16", "16", "32"), default="bf16")
    parser.add_argument("--overwrite", action="store_true")
    return parser


def settings(args: argparse.Namespace) -> DumpConfig:
    """Return the configuration of `nemo-kd dump`; each of its keys can be set here."""
    return DumpConfig(
        trainer=TrainerConfig(precision=args.precision),
        teacher=TeacherConfig(kind="hf"),
        model=TeacherModelConfig(
            restore_from_path=args.teacher,
            tensor_model_parallel_size=args.tensor_parallel,
            pipeline_model_parallel_size=args.pipeline_parallel,
            sequence_parallel=args.sequence_parallel,
            micro_batch_size=args.micro_batch_size,
        ),
        data=DataConfig(
            file_path=args.data,
            max_seq_length=args.max_seq_length,
            prompt_template=args.prompt_template,
        ),
        dump=TopKConfig(top_k=args.top_k),
        output_dir=args.output,
        overwrite=args.overwrite,
    )


def main() -> None:
    args = parser().parse_args()
    cpu.install()
    from nemo_kd.bridge import load_teacher
    from nemo_kd.teacher.dump import dump

    config = settings(args)
    teacher = load_teacher(config)
    manifest = dump(config, teacher)
    if manifest is not None and teacher.layout.rank == 0:
        totals = manifest.totals
        print(f"{args.output}: {totals['samples']} samples, {totals['answer_tokens']} tokens")


if __name__ == "__main__":
    with reported():
        main()
