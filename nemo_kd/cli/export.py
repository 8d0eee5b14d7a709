"""`nemo-kd export`: a model of NeMo or Megatron-core as a Hugging Face directory."""

from __future__ import annotations

import dataclasses
import json
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from nemo_kd.cli.app import Overwrite, app, progress

if TYPE_CHECKING:
    from nemo_kd.checkpoints.card import Card
    from nemo_kd.checkpoints.source import Source


class Precision(StrEnum):
    """Data type of the written weights."""

    own = "own"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.command()
def export(
    source: Annotated[
        Path, typer.Argument(help=".nemo (file or directory), or a checkpoint's directory")
    ],
    output: Annotated[Path, typer.Argument(help="Hugging Face directory to write")],
    base: Annotated[
        Path | None,
        typer.Option(
            help="Hugging Face directory with the model's config.json and tokenizer; for "
            "Megatron-core's checkpoints, which have neither."
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer directory to write in place of the model's own.")
    ] = None,
    base_model: Annotated[
        Path | None,
        typer.Option(help="Model (as SOURCE) into which SOURCE, LoRA adapters, is merged."),
    ] = None,
    peft: Annotated[
        bool, typer.Option("--peft", help="Write LoRA adapters as a directory of PEFT.")
    ] = False,
    dtype: Annotated[Precision, typer.Option(help="Type of the weights.")] = Precision.own,
    verify: Annotated[
        bool | None,
        typer.Option(
            help="Compare logits with NeMo's and refuse a model that differs; default: a .nemo of "
            "up to 1 billion parameters, if NeMo is installed."
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write SOURCE as a Hugging Face directory, which transformers loads.

    nemo-kd export student.nemo student_hf

    nemo-kd export run/iter_0000100 student_hf --base base_hf

    nemo-kd export lora.nemo student_hf --base-model student.nemo

    nemo-kd export lora.nemo adapters --peft
    """
    import torch

    from nemo_kd.checkpoints.export import comparable, export, open_student
    from nemo_kd.checkpoints.source import open_source
    from nemo_kd.checkpoints.verify import is_verified

    start = time.perf_counter()
    wanted = None if dtype is Precision.own else getattr(torch, dtype.value)
    if peft:
        from nemo_kd.checkpoints.peft import export_adapters

        if base_model is not None:
            raise typer.BadParameter(
                "merges the adapters; give it or --peft", param_hint="base-model"
            )
        if verify:
            raise typer.BadParameter(
                "adapters have no logits to compare; leave it out with --peft", param_hint="verify"
            )
        card = card_of(open_source(source))
        count = export_adapters(
            *(source, output),
            base=base,
            tokenizer=tokenizer,
            dtype=wanted,
            overwrite=overwrite,
            card=card,
        )
        Console().print(f"{output}: {count} adapters for PEFT", soft_wrap=True)
        return
    student = open_student(source, base, tokenizer, base_model)
    inputs = tuple(path for path in (base, tokenizer, base_model) if path is not None)
    reason = comparable(student)
    if verify and reason is not None:
        raise typer.BadParameter(reason, param_hint="verify")
    compare = reason is None and is_verified(verify, student.model)
    with progress("exporting") as advance:
        done = export(
            student,
            output,
            inputs=inputs,
            dtype=wanted,
            overwrite=overwrite,
            card=card_of(student.record),
            progress=advance,
            compare=compare,
        )
    console = Console()
    console.print(
        f"{done.path}: {done.model.architecture}, {done.model.num_layers} layers, "
        f"{done.parameters / 1e6:.1f} M parameters, {str(done.dtype).removeprefix('torch.')}, "
        f"{done.nbytes / 1e6:.0f} MB, {time.perf_counter() - start:.1f} s",
        soft_wrap=True,
    )
    if done.verified:
        console.print(
            f"logits of {done.verified.tokens} tokens differ from NeMo's by at most "
            f"{done.verified.difference:.1e}"
        )
    if done.stored_rows > done.model.vocab_size:
        console.print(
            f"{done.stored_rows - done.model.vocab_size} embedding rows beyond the tokenizer's "
            f"{done.model.vocab_size} ids are padding and were left out"
        )


def card_of(source: Source) -> Card:
    """What a model card can say beside the checkpoint's configuration: from stores and metrics."""
    from nemo_kd.checkpoints.card import STEPS, STORES, Card
    from nemo_kd.store import Store, StoreError

    section, stores = source.section or {}, {}
    for one in section.get(STORES) or []:
        try:
            store = Store(str(one["path"]))
        except (StoreError, OSError, KeyError, TypeError):
            continue  # moved, or an SFT file
        if store.fingerprint == one.get("fingerprint"):
            of_teacher = {f"teacher's {key}": value for key, value in store.spec.teacher.items()}
            stores[store.fingerprint] = {**of_teacher, "K": store.spec.top_k}
    steps = section.get(STEPS)
    return Card(stores, _distillation(section) if steps else {}, _figures(source, steps))


def _distillation(section: dict[str, Any]) -> dict[str, Any]:
    """Settings of `model.kd`, if the training had a store and a weight of the KD loss."""
    from omegaconf import OmegaConf

    from nemo_kd.errors import NemoKDError
    from nemo_kd.nemo.config import kd_training_config

    data = section.get("data")
    train = data.get("train_ds") if isinstance(data, dict) else None
    if not isinstance(train, dict) or not train.get("store"):
        return {}
    try:
        config = kd_training_config(OmegaConf.create(section.get("kd") or {}))
    except NemoKDError:  # of another version
        return {}
    settings = dataclasses.asdict(config)
    in_effect = {
        "beta": config.divergence == "jsd",
        "skew": config.divergence.startswith("skew_"),
        "schedule": config.scheduled,
        "schedule_steps": config.scheduled,
    }
    settings |= {name: None for name, used in in_effect.items() if not used}
    if (config.sft_weight, config.kd_weight) == (None, None):
        settings["alpha"] = config.weights[1] if train.get("alpha") is None else train["alpha"]
    return settings if config.distils else {}


def _figures(source: Source, steps: int | None) -> dict[str, float]:
    """Figures of the last validation, if `metrics.jsonl` ends with the model's last step."""
    path = source.path.resolve().parent.parent / "metrics.jsonl"
    found: dict[str, float] = {}
    if steps is None or not path.is_file():
        return found
    last = 0
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        last = max(last, int(values.get("step", 0)))
        now = {key.removeprefix("val/"): values[key] for key in values if key.startswith("val/")}
        found = now or found
    return found if last == steps else {}
