"""Distil a student of transformers from a store, in transformers' Trainer.

    python examples/huggingface/train.py Qwen2.5-0.5B/ --store store --output run --lora 16
    torchrun --nproc_per_node=2 examples/huggingface/train.py student/ --store store --output run

STUDENT is a Hugging Face directory, or the .gguf file of a Llama.
"""

from __future__ import annotations

import argparse

from transformers import Trainer, TrainingArguments

from nemo_kd.cli.failures import reported
from nemo_kd.hf import StoreCollator, StoreDataset, StoreLossMixin
from nemo_kd.hf.student import load_student, refuse_filled
from nemo_kd.loss import SUPPORTS, KDConfig


class StoreTrainer(StoreLossMixin, Trainer):
    """`Trainer` with the loss of a store."""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("student", help="directory or .gguf file")
    parser.add_argument("--keep-layers", help="layers to keep, such as 0,1,8-11, or @FILE")
    parser.add_argument("--store", nargs="+", required=True, help="one or several stores")
    parser.add_argument("--output", required=True, help="new directory for the trained student")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train adapters, by peft")
    parser.add_argument("--alpha", type=float, help="weight of the distillation")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--support", choices=SUPPORTS, default="bucket")
    parser.add_argument("--max-seq-length", type=int, help="refuse longer samples")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=8, help="samples per process and batch")
    parser.add_argument("--accumulate", type=int, default=1, help="batches per step")
    parser.add_argument("--lr", type=float, default=4e-4)
    return parser


def training(args: argparse.Namespace) -> TrainingArguments:
    return TrainingArguments(
        args.output,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulate,
        average_tokens_across_devices=True,
        learning_rate=args.lr,
        warmup_steps=min(10, args.steps // 10),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )


def main() -> None:
    args = parser().parse_args()
    refuse_filled(args.output)
    model, tokenizer = load_student(args.student, args.keep_layers)
    if args.lora:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=args.lora, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    config = KDConfig(alpha=args.alpha, temperature=args.temperature, support=args.support)
    data = StoreDataset(args.store, config, max_seq_length=args.max_seq_length, tokenizer=tokenizer)
    tokenizer.chat_template = data.chat_template or tokenizer.chat_template
    trainer = StoreTrainer(
        model=model,
        args=training(args),
        data_collator=StoreCollator(data),
        train_dataset=data,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    with reported():
        main()
