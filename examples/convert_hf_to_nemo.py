"""Convert a Hugging Face directory, or the .gguf file of a Llama, to .nemo.

    python examples/convert_hf_to_nemo.py SmolLM2-135M/ teacher.nemo
    python examples/convert_hf_to_nemo.py model.gguf student.nemo --keep-layers 0,1,8,9,19-24,29

`--keep-layers @FILE` reads the list `kept` of a JSON file, such as examples/demo/block_influence.py
writes. The tokenizer is written next to the .nemo, to `teacher.tokenizer/`. The .nemo loads at any
tensor and pipeline parallel size, with TransformerEngine (in the container) and without (on a CPU).
"""

from __future__ import annotations

import time
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from nemo_kd.checkpoints import open_checkpoint, parse_layers, write_nemo, written_bytes
from nemo_kd.checkpoints.verify import is_verified
from nemo_kd.cli.failures import reported


class Precision(StrEnum):
    """Data type of the written weights."""

    own = "own"
    float32 = "float32"
    bfloat16 = "bfloat16"


def main(
    source: Annotated[Path, typer.Argument(help="Hugging Face directory or .gguf file")],
    output: Annotated[Path, typer.Argument(help=".nemo file to write")],
    keep_layers: Annotated[
        str | None,
        typer.Option(help="layers to keep, such as 0,1,8-11, or @FILE; default: all"),
    ] = None,
    dtype: Annotated[
        Precision, typer.Option(help="own: as in the checkpoint; float32 if it is quantised")
    ] = Precision.own,
    verify: Annotated[
        bool | None,
        typer.Option(
            help="compare logits with transformers' and refuse a model that differs; "
            "default: up to 1 billion parameters, if NeMo is installed"
        ),
    ] = None,
) -> None:
    """Convert SOURCE to the .nemo file OUTPUT, for NeMo's MegatronGPTSFTModel."""
    console = Console()
    if output.suffix != ".nemo":
        raise typer.BadParameter(f"{output} must end in .nemo", param_hint="OUTPUT")
    if output.is_dir():
        raise typer.BadParameter(f"{output} is a directory", param_hint="OUTPUT")
    start = time.perf_counter()
    wanted = None if dtype is Precision.own else getattr(torch, dtype.value)
    with Progress(*Progress.get_default_columns(), console=console, transient=True) as bar:
        task = bar.add_task("reading", total=None)
        checkpoint = open_checkpoint(source)
        layers = parse_layers(keep_layers, checkpoint.model.num_layers)
        size = written_bytes(checkpoint, len(layers), wanted)
        bar.update(task, description="converting", total=size)
        compare = is_verified(verify, replace(checkpoint.model, num_layers=len(layers)))

        def written(count: int) -> None:
            bar.advance(task, count)
            if compare and bar.finished:
                bar.update(task, description="comparing logits", total=None)

        done = write_nemo(checkpoint, output, layers, wanted, written, compare=compare)
    console.print(
        f"{done.path}: {len(layers)} of {checkpoint.model.num_layers} layers, "
        f"{done.parameters / 1e6:.1f} M parameters, {str(done.dtype).removeprefix('torch.')}, "
        f"{done.path.stat().st_size / 1e6:.0f} MB, {time.perf_counter() - start:.1f} s",
        soft_wrap=True,
    )
    if done.verified:
        console.print(
            f"logits of {done.verified.tokens} tokens differ from transformers' by at most "
            f"{done.verified.difference:.1e}"
        )
    else:
        console.print("logits were not compared with transformers': --verify does it")
    if done.unused_rows:
        console.print(
            f"{done.unused_rows} embedding rows beyond the tokenizer's {done.vocab_size} ids are "
            "kept, but not trained"
        )
    if checkpoint.model.max_tokens is not None:
        console.print(
            f"for rows of at most {checkpoint.model.max_tokens} tokens: beyond, its positions or "
            "its attention change, which Megatron-core does not do"
        )


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    with reported(resume="the same command starts over"):
        app()
