"""Quantise a student with NVIDIA's modelopt, and distil a store into it (QAD), in transformers.

    python examples/qad/train.py outputs/demo/hf --store outputs/demo/store-train \\
        --heldout outputs/demo/store-heldout --output outputs/qad

STUDENT is a Hugging Face directory or a .gguf file. Weights are rounded in the forward pass and
kept in float32; the gradient goes straight through. Prints the held-out loss of the student before
quantisation, after it and after training, with the share of the loss that training recovered, and
writes them to `qad.json`. `--format none` trains the same steps without quantisation, `--alpha 0`
on the labels alone: controls for what training by itself gains.

The output is loaded by `transformers` after `modelopt.torch.opt.enable_huggingface_checkpointing`.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from nemo_kd.cli.failures import reported
from nemo_kd.cli.option_types import count, positive
from nemo_kd.errors import NemoKDError
from nemo_kd.extras import install
from nemo_kd.hf import StoreCollator, StoreDataset, StoreLossMixin
from nemo_kd.hf.student import load_student, new_output
from nemo_kd.loss import KDConfig

CALIBRATION_BATCHES = 4
TERMS = ("sft_loss", "kd_loss")


class StoreTrainer(StoreLossMixin, Trainer):
    """`Trainer` with the loss of a store."""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("student", help="directory or .gguf file")
    parser.add_argument("--store", nargs="+", required=True, help="one or several stores")
    parser.add_argument("--heldout", nargs="+", required=True, help="stores to measure on")
    parser.add_argument("--output", required=True, help="new directory for the trained student")
    parser.add_argument(
        "--format",
        default="INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
        help="a configuration of modelopt.torch.quantization, or none",
    )
    parser.add_argument("--alpha", type=float, default=1.0, help="weight of the distillation")
    parser.add_argument("--steps", type=count, default=100)
    parser.add_argument("--batch-size", type=count, default=8, help="samples per process and batch")
    parser.add_argument("--lr", type=positive, default=3e-4)
    return parser


def quantise(model: Any, name: str, loader: DataLoader[Any]) -> None:
    """Insert modelopt's quantisers in place, calibrated on the first batches of `loader`.

    Errors: NemoKDError for a format that modelopt does not have, or cannot run here.
    """
    from modelopt.torch import quantization

    names = [known for known in dir(quantization) if known.endswith("_CFG")]
    if name not in names:
        raise NemoKDError(f"--format {name}: modelopt has none, {', '.join(names)}")

    def calibrate(model: Any) -> None:
        for _, batch in zip(range(CALIBRATION_BATCHES), loader, strict=False):
            model(input_ids=batch["input_ids"].to(model.device))

    try:
        with torch.no_grad():
            quantization.quantize(model, getattr(quantization, name), calibrate)
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device))
    except (AssertionError, RuntimeError) as error:
        if torch.cuda.is_available():
            raise
        reason = str(error).splitlines()[0]
        raise NemoKDError(f"--format {name} needs CUDA, as modelopt says: {reason}") from error


@torch.no_grad()
def samples_losses(model: Any, loader: DataLoader[Any], collate: StoreCollator) -> Tensor:
    """Sums of `TERMS` and number of answer tokens of each sample, [N, 3] float64."""
    model.eval()
    rows = []
    for batch in loader:
        batch = {name: x.to(model.device) for name, x in batch.items()}
        shown = {name: batch[name] for name in ("input_ids", "attention_mask")}
        losses = collate.token_losses(model(**shown).logits, batch)
        answers = (batch["labels"] >= 0).sum(1)
        rows.append(torch.stack([losses.nll.sum(1), losses.kd.sum(1), answers], 1).double().cpu())
    return torch.cat(rows)


def mean_loss(rows: Tensor) -> dict[str, float]:
    """Means over the answer tokens, in nats."""
    sums = rows.sum(0)
    return {name: float(sums[i] / sums[-1]) for i, name in enumerate(TERMS)}


def ratio(above: Tensor, below: Tensor) -> tuple[float, float]:
    """`above.sum() / below.sum()` over samples [N], and its standard error by the delta method.

    Samples are independent of each other, the tokens of one are not.
    """
    value = above.sum() / below.sum()
    error = (above - value * below).std() * math.sqrt(len(above)) / below.sum().abs()
    return float(value), float(error)


def difference(rows: Tensor, base: Tensor) -> dict[str, dict[str, float]]:
    """Mean difference per answer token and its standard error, paired by sample."""
    found = {}
    for i, name in enumerate(TERMS):
        nats, error = ratio(rows[:, i] - base[:, i], rows[:, -1])
        found[name] = {"nats": nats, "standard_error": error}
    return found


def recovered(measured: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Share of the loss by quantisation that training made good, and its standard error."""
    found = {}
    for i, name in enumerate(TERMS):
        before, quantised, trained = (
            measured[state][:, i] for state in ("before", "quantised", "trained")
        )
        left, error = ratio(trained - before, quantised - before)
        found[name] = {"share": 1 - left, "standard_error": error}
    return found


def result(measured: dict[str, Tensor]) -> dict[str, Any]:
    """Losses of each state, their differences to `before`, and the recovered shares."""
    before = measured["before"]
    lost = {name: difference(rows, before) for name, rows in measured.items() if name != "before"}
    found: dict[str, Any] = {
        "losses": {name: mean_loss(rows) for name, rows in measured.items()},
        "above_before": lost,
    }
    if {"quantised", "trained"} <= set(measured):
        found["recovered"] = recovered(measured)
    return found


def show(found: dict[str, Any]) -> None:
    print(f"{'held-out, nats per answer token':32} {'cross-entropy':>20} {'distillation':>20}")
    for name, losses in found["losses"].items():
        cells = [f"{losses[term]:.4f}" for term in TERMS]
        print(f"{name:32} {cells[0]:>20} {cells[1]:>20}")
    for name, lost in found["above_before"].items():
        each = [lost[term] for term in TERMS]
        cells = [f"{one['nats']:+.4f} ± {one['standard_error']:.4f}" for one in each]
        print(f"{name + ' - before':32} {cells[0]:>20} {cells[1]:>20}")
    if "recovered" in found:
        shares = [found["recovered"][term] for term in TERMS]
        cells = [f"{one['share']:.1%} ± {one['standard_error']:.1%}" for one in shares]
        print(f"{'recovered':32} {cells[0]:>20} {cells[1]:>20}")


def checkpointing() -> None:
    """Let `from_pretrained` and `save_pretrained` keep the quantisers."""
    try:
        from modelopt.torch.opt import enable_huggingface_checkpointing
    except ImportError as error:
        raise NemoKDError(f"modelopt: {error}; {install('qad')}") from error
    enable_huggingface_checkpointing()


def training(args: argparse.Namespace) -> TrainingArguments:
    return TrainingArguments(
        args.output,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        average_tokens_across_devices=True,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        warmup_steps=min(10, args.steps // 10),
        logging_steps=5,
        save_strategy="no",
        report_to="none",
    )


def main() -> None:
    args = parser().parse_args()
    with new_output(args.output):
        run(args)


def run(args: argparse.Namespace) -> None:
    checkpointing()
    model, tokenizer = load_student(args.student)
    config = KDConfig(alpha=args.alpha)
    data = StoreDataset(args.store, config, tokenizer=tokenizer)
    tokenizer.chat_template = data.chat_template or tokenizer.chat_template
    collate = StoreCollator(data)
    heldout = DataLoader(
        StoreDataset(args.heldout, config, tokenizer=tokenizer),
        batch_size=args.batch_size,
        collate_fn=collate,
    )
    trainer = StoreTrainer(
        model=model,
        args=training(args),
        data_collator=collate,
        train_dataset=data,
        processing_class=tokenizer,
    )
    measured = {"before": samples_losses(model, heldout, collate)}
    if args.format != "none":
        quantise(model, args.format, DataLoader(data, args.batch_size, collate_fn=collate))
        measured["quantised"] = samples_losses(model, heldout, collate)
        show(result(measured))
    trainer.train()
    measured["trained"] = samples_losses(model, heldout, collate)
    trainer.save_model()
    found = result(measured)
    show(found)
    kept = ("format", "alpha", "steps", "batch_size", "lr")
    report = {**{name: getattr(args, name) for name in kept}, **found}
    Path(args.output, "qad.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with reported():
        main()
