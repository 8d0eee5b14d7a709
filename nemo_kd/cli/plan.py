"""`nemo-kd plan`: disk, time and memory of a dump, before anyone spends a GPU hour."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer
from rich.console import Console

from nemo_kd.cli.app import Json, app, print_json

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}


@app.command()
def plan(
    tokens: Annotated[str, typer.Option(help="Answer tokens: 300M.")],
    teacher: Annotated[str, typer.Option(help="The teacher's parameters: 70B.")],
    vocab_size: Annotated[int, typer.Option(min=1)],
    gpus: Annotated[int, typer.Option(min=1)],
    total_tokens: Annotated[
        str | None, typer.Option(help="Prompts and answers; twice the answers by default.")
    ] = None,
    samples: Annotated[
        str | None, typer.Option(help="One for 300 answer tokens by default.")
    ] = None,
    top_k: Annotated[int, typer.Option(min=1)] = 100,
    profile: Annotated[str, typer.Option(help="plain, compact, top_p or sampled.")] = "plain",
    kept: Annotated[
        float | None, typer.Option(help="Ids a token that top_p or sampled keep on average.")
    ] = None,
    temperatures: Annotated[str, typer.Option(help="A log-sum-exp for each.")] = "1.0",
    tensor_parallel: Annotated[int, typer.Option("--tp", min=1)] = 1,
    pipeline_parallel: Annotated[int, typer.Option("--pp", min=1)] = 1,
    gpu_tflops: Annotated[float, typer.Option(help="Dense bf16 peak; 989: H100 SXM.")] = 989.0,
    utilisation: Annotated[float, typer.Option(help="Share of it in a forward pass.")] = 0.35,
    gpu_memory: Annotated[float, typer.Option(help="GiB of one GPU.")] = 80.0,
    as_json: Json = False,
) -> None:
    """What a dump will cost: disk, dump time, memory of a GPU."""
    from nemo_kd.cli.conversions import numbers
    from nemo_kd.store.plan import Workload
    from nemo_kd.store.plan import plan as plan_of
    from nemo_kd.store.spec import StoreSpec

    answers = quantity("--tokens", tokens)
    work = Workload(
        answer_tokens=answers,
        total_tokens=2 * answers if total_tokens is None else quantity("--total", total_tokens),
        samples=answers / 300 if samples is None else quantity("--samples", samples),
        teacher_parameters=quantity("--teacher", teacher),
        gpus=gpus,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        gpu_tflops=gpu_tflops,
        utilisation=utilisation,
        gpu_memory_gib=gpu_memory,
    )
    spec = StoreSpec(
        top_k=top_k,
        vocab_size=vocab_size,
        temperatures=tuple(numbers("--temperatures", temperatures)),
        profile=profile,
        profile_options={"p": 1.0} if profile == "top_p" else {},
    )
    result = plan_of(spec, work, kept).to_json()
    if as_json:
        print_json(result)
    else:
        _print(result, work.gpus)


def quantity(option: str, text: str) -> float:
    """`300M` → 3e8; k, M, B (or G) and T."""
    from nemo_kd.store.errors import StoreError

    match = re.fullmatch(r"([\d_.]+(?:e\d+)?)\s*([kmbgt]?)", text.strip().lower())
    try:
        value = float(match[1]) if match else None
    except ValueError:
        value = None
    if match is None or value is None:
        raise StoreError(f"{option} wants a number such as 300M or 70B, not {text!r}")
    return value * _UNITS[match[2]]


def _print(result: dict[str, Any], gpus: int) -> None:
    from nemo_kd.cli import render

    fits = (
        "fits"
        if result["fits"]
        else (
            f"does not fit: at least {result['smallest_model_parallel']} GPUs for one teacher "
            "(--tp × --pp)"
        )
    )
    memory = result["weights_bytes_per_gpu"] + result["other_bytes_per_gpu"]
    rows = {
        "disk": f"{render.size(result['disk_bytes'])}, "
        f"{result['bytes_per_answer_token']:.0f} bytes an answer token",
        "as NeMo-Aligner's JSONL": f"about {render.size(result['jsonl_bytes'])}",
        "dump": f"about {render.duration(result['dump_seconds'])} on {gpus} GPUs, "
        f"{result['gpu_hours']:.1f} GPU hours",
        "memory of a GPU": f"about {render.size(memory)}, "
        f"{render.size(result['weights_bytes_per_gpu'])} of it weights; {fits}",
    }
    Console().print(render.pairs("plan", rows))
