"""Distil a student of transformers from a store, in transformers' Trainer.

    python examples/huggingface/train.py Qwen2.5-0.5B/ --store store --output run --lora 16
    torchrun --nproc_per_node=2 examples/huggingface/train.py student/ --store store --output run

STUDENT is a Hugging Face directory, or the .gguf file of a Llama. With --lora OUTPUT has adapters
of it; of a pruned student or a .gguf file also the student that they belong to, in OUTPUT/base.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments

from nemo_kd.cli.failures import reported
from nemo_kd.cli.option_types import count, positive
from nemo_kd.hf import StoreCollator, StoreDataset, StoreLossMixin
from nemo_kd.hf.student import load_student, new_output
from nemo_kd.loss import SUPPORTS, KDConfig

BASE = "base"
"""Directory in the output with the weights that adapters belong to, where no other one has them."""


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
    parser.add_argument("--lora", type=count, metavar="RANK", help="train adapters, by peft")
    parser.add_argument("--alpha", type=float, help="weight of the distillation")
    parser.add_argument("--temperature", type=positive, default=1.0)
    parser.add_argument("--support", choices=SUPPORTS, default="bucket")
    parser.add_argument("--max-seq-length", type=count, help="refuse longer samples")
    parser.add_argument("--steps", type=count, default=120)
    parser.add_argument("--batch-size", type=count, default=8, help="samples per process and batch")
    parser.add_argument("--accumulate", type=count, default=1, help="batches per step")
    parser.add_argument("--lr", type=positive, default=4e-4)
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


def adapted(model: Any, rank: int, weights: Path) -> Any:
    """Return the model with adapters that name the directory of its weights."""
    from peft import LoraConfig, get_peft_model

    model.name_or_path = str(weights.absolute())  # that of a pruned model is the whole one's
    lora = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def trained(args: argparse.Namespace) -> StoreTrainer:
    model, tokenizer = load_student(args.student, args.keep_layers)
    if args.lora is not None:
        is_saved = Path(args.student).is_dir() and args.keep_layers is None
        weights = Path(args.student) if is_saved else Path(args.output, BASE)
        model = adapted(model, args.lora, weights)
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
    return trainer


def save(trainer: StoreTrainer) -> None:
    """Save the student; its adapters, and the weights beneath them if no directory has them."""
    model, base = trainer.model, Path(trainer.args.output_dir, BASE)
    alone = trainer.args.should_save and model.name_or_path == str(base.absolute())
    if alone:
        model.config.save_pretrained(base)  # which peft compares when it saves adapters
    trainer.save_model()
    trainer.save_state()
    if alone:
        model.unload().save_pretrained(base)
        trainer.processing_class.save_pretrained(base)


def main() -> None:
    args = parser().parse_args()
    with new_output(args.output):
        save(trained(args))


if __name__ == "__main__":
    with reported():
        main()
