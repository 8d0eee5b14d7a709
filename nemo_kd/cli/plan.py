"""`nemo-kd plan`: estimate the disk space, time and memory of a dump."""

from __future__ import annotations

import math
from typing import Annotated, Any

import typer

from nemo_kd.cli.app import Json, app, print_json
from nemo_kd.cli.quantity import Quantity, share
from nemo_kd.errors import StoreError

TOKENS = Quantity("--tokens", "tokens", 1e3, 1e14, "300M", usual="M")
TOTAL_TOKENS = Quantity("--total-tokens", "tokens", 1e3, 1e14, "600M", usual="M")
SAMPLES = Quantity("--samples", "samples", 1, 1e12, "1M")
TEACHER = Quantity("--teacher", "parameters", 1e6, 1e13, "70B", usual="B")
TFLOPS = Quantity("--gpu-tflops", "TFLOP/s", 1, 2e4, "989 (H100 SXM; A100: 312)")
MEMORY = Quantity("--gpu-memory", "GiB", 1, 2e3, "80 (GiB)")
MAX_SAMPLE_TOKENS = 10_000_000  # longer than any model's context
MAX_VOCABULARY = 10_000_000


@app.command()
def plan(
    tokens: Annotated[str, typer.Option(help="Number of answer tokens, such as 300M.")],
    teacher: Annotated[str, typer.Option(help="Number of the teacher's parameters, such as 70B.")],
    vocab_size: Annotated[int, typer.Option(min=1, help="Size of the vocabulary.")],
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")],
    total_tokens: Annotated[
        str | None, typer.Option(help="Tokens of prompts and answers; default: twice --tokens.")
    ] = None,
    samples: Annotated[
        str | None, typer.Option(help="Number of samples; default: one per 300 answer tokens.")
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="K, or draws for the profile sampled.")] = 100,
    profile: Annotated[str, typer.Option(help="plain, compact, top_p or sampled.")] = "plain",
    kept: Annotated[
        float | None, typer.Option(help="Mean number of ids per token for top_p or sampled.")
    ] = None,
    tensor_parallel: Annotated[int, typer.Option("--tp", min=1, help="Tensor parallel size.")] = 1,
    pipeline_parallel: Annotated[
        int, typer.Option("--pp", min=1, help="Pipeline parallel size.")
    ] = 1,
    gpu_tflops: Annotated[str, typer.Option(help="Dense bf16 peak of one GPU, TFLOP/s.")] = "989",
    utilisation: Annotated[str, typer.Option(help="Fraction of peak, 0.35 or 35%.")] = "0.35",
    gpu_memory: Annotated[str, typer.Option(help="Memory of one GPU in GiB.")] = "80",
    rows_per_shard: Annotated[int, typer.Option(min=1, help="Rows of a shard of the dump.")] = 256,
    hours_between_failures: Annotated[
        float | None, typer.Option(min=0.1, help="Mean time between failures of a node.")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Training ranks, 8 per node, that read the store.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Estimate the disk space, files, time and GPU memory of a dump, and the cost of reading it."""
    from nemo_kd.cli import render
    from nemo_kd.store.spec import StoreSpec
    from nemo_kd.teacher.plan import Workload
    from nemo_kd.teacher.plan import plan as plan_of
    from nemo_kd.teacher.scale import Cluster, scale

    answers = TOKENS.parse(tokens)
    total = 2 * answers if total_tokens is None else TOTAL_TOKENS.parse(total_tokens)
    amounts: dict[str, Any] = {
        "answer_tokens": answers,
        "total_tokens": total,
        "samples": answers / 300 if samples is None else SAMPLES.parse(samples),
        "teacher_parameters": TEACHER.parse(teacher),
        "gpu_tflops": TFLOPS.parse(gpu_tflops),
        "utilisation": share("--utilisation", utilisation),
        "gpu_memory_gib": MEMORY.parse(gpu_memory),
    }
    _check_data(answers, total, amounts["samples"])
    if gpus % (tensor_parallel * pipeline_parallel):
        raise StoreError(
            f"--gpus {gpus} is not a multiple of --tp {tensor_parallel} × --pp "
            f"{pipeline_parallel}, the GPUs of one teacher"
        )
    _check_profile(profile, top_k=top_k, vocab_size=vocab_size, kept=kept)
    work = Workload(
        gpus=gpus,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        **amounts,
    )
    spec = StoreSpec(
        top_k=top_k,
        vocab_size=vocab_size,
        profile=profile,
        profile_options={"p": 1.0} if profile == "top_p" else {},
        rows_per_shard=rows_per_shard,
    )
    planned = plan_of(spec, work, kept)
    cluster = Cluster(hours_between_failures or math.inf, training_ranks=ranks or 8)
    result, large = planned.to_json(), scale(spec, work, planned, cluster).to_json()
    if as_json:
        print_json({**result, "scale": {k: v for k, v in large.items() if math.isfinite(v)}})
        return
    rows = _dump_rows(result, work.gpus) | _file_rows(large)
    if hours_between_failures is not None:
        rows |= _failure_rows(large, hours_between_failures)
    if ranks is not None:
        rows |= _reading_rows(large, ranks)
    render.console().print(render.pairs("plan", rows))


def _check_data(answers: float, total: float, samples: float) -> None:
    if total < answers:
        raise StoreError(
            f"--total-tokens {total:,.0f} are fewer than the answer tokens in them, --tokens "
            f"{answers:,.0f}"
        )
    if not 1 <= total / samples <= MAX_SAMPLE_TOKENS:
        raise StoreError(
            f"--samples {samples:,.0f} with {total:,.0f} tokens in total would have "
            f"{total / samples:,.3g} tokens each; is a unit missing (k, M)?"
        )


def _check_profile(profile: str, *, top_k: int, vocab_size: int, kept: float | None) -> None:
    from nemo_kd.store.codecs import CODECS
    from nemo_kd.store.codecs.sampled import MAX_DRAWS
    from nemo_kd.teacher.plan import VARIABLE

    if profile not in CODECS:
        raise StoreError(f"--profile must be one of {', '.join(CODECS)}, not {profile!r}")
    if not 256 <= vocab_size <= MAX_VOCABULARY:
        raise StoreError(
            f"--vocab-size {vocab_size} is implausible; Llama 3 has --vocab-size 128256"
        )
    if top_k > vocab_size:
        raise StoreError(f"--top-k {top_k} is more than --vocab-size {vocab_size}")
    if profile == "sampled" and top_k > MAX_DRAWS:
        raise StoreError(
            f"--top-k {top_k}: the profile sampled has at most {MAX_DRAWS} draws per token"
        )
    if kept is None:
        return
    if profile not in VARIABLE:
        raise StoreError(
            f"--kept is for the profiles {' and '.join(VARIABLE)}; {profile} keeps --top-k ids per "
            "token"
        )
    if not 1 <= kept <= top_k:
        raise StoreError(f"--kept {kept:g} is not between 1 and --top-k {top_k}")


def _dump_rows(result: dict[str, Any], gpus: int) -> dict[str, str]:
    from nemo_kd.cli import render

    fits = "fits"
    if result["smallest_model_parallel"] is None:
        fits = (
            f"does not fit: no number of GPUs is enough, since logits and activations alone take "
            f"{render.size(result['other_bytes_per_gpu'])} of each; give GPUs with more memory, or "
            "raise --tp"
        )
    elif not result["fits"]:
        fits = (
            f"does not fit: at least {result['smallest_model_parallel']} GPUs for one teacher "
            "(--tp × --pp)"
        )
    idle = result["idle_gpus"]
    memory = result["weights_bytes_per_gpu"] + result["other_bytes_per_gpu"]
    about = {"estimate": "about ", "most": "at most "}.get(result["ids_from"], "")
    rows = {
        "disk": f"{about}{render.size(result['disk_bytes'])}, "
        f"{result['bytes_per_answer_token']:.0f} bytes per answer token",
        "as NeMo-Aligner's JSONL": f"about {render.size(result['jsonl_bytes'])}",
        "dump": f"about {render.duration(result['dump_seconds'])} on {gpus - idle} GPUs, "
        f"{result['gpu_hours']:,.1f} GPU hours{_idle(idle)}",
        "memory per GPU": f"about {render.size(memory)}, "
        f"{render.size(result['weights_bytes_per_gpu'])} of it weights; {fits}",
    }
    if about:
        ids = f"{about}{result['ids_per_token']:.0f}"
        source = "more on prose than on code" if about == "about " else "all of --top-k"
        rows["ids per token"] = f"{ids}, {source}; --kept sets it"
    return rows


def _idle(gpus: int) -> str:
    """Say that there are fewer shards than teachers."""
    if not gpus:
        return ""
    return f"; {gpus:,} idle: fewer shards than teachers, lower --rows-per-shard or --gpus"


def _file_rows(large: dict[str, Any]) -> dict[str, str]:
    from nemo_kd.cli import render

    return {
        "files": f"{large['files']:,} in {large['segments']:,} "
        f"segment{'' if large['segments'] == 1 else 's'} of "
        f"{render.size(large['segment_bytes'])}; {large['files_while_dumping']:,} while dumping"
    }


def _failure_rows(large: dict[str, Any], hours: float) -> dict[str, str]:
    from nemo_kd.cli import render

    return {
        "with failures": f"about {render.duration(large['dump_seconds'])}, "
        f"{large['failures']:,.1f} restarts at one failure every {hours:g} h, "
        f"{render.duration(large['lost_seconds_per_failure'])} lost at each"
    }


def _reading_rows(large: dict[str, Any], ranks: int) -> dict[str, str]:
    from nemo_kd.cli import render

    return {
        "opening": f"about {render.size(large['opening_bytes_per_node'])} per node, "
        f"{render.size(large['opening_bytes'])} for {ranks:,} ranks",
        "remote epoch": f"about {render.size(large['epoch_bytes_own_caches'])} over the network "
        f"with a cache per node, {render.size(large['epoch_bytes_shared_cache'])} with one cache",
    }
