"""Compare time and memory of the loss with Megatron's cross-entropy and a dense loss.

    python benchmarks/loss.py            # a table, benchmarks/results/loss.json, docs/loss.md

Time: the minimum over several forward + backward passes; the two candidates alternate in one
process (or one per rank). Memory: the peak growth of a separate process, including its inputs,
after a small pass has loaded the libraries; for the LM head without hidden states and weight, both
with and without the weight's gradient, which either way has to be returned.
float32 on a CPU unless noted, K = 100.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.machine import machine
from benchmarks.pages import write_table

HERE = Path(__file__).parent
RESULT = HERE / "results" / "loss.json"
PAGE = HERE.parent / "docs" / "loss.md"
SHAPES = ((1024, 49_152), (512, 128_256))
HEAD = (2048, 49_152, 576)
ROUNDS = 7
KEYS = (
    *("shape", "against", "ms", "their_ms", "time_ratio", "time_target"),
    *("mb", "their_mb", "memory_ratio", "memory_target"),
)
Step = Callable[[], None]
Make = Callable[..., tuple[Step, Step]]
Candidate = tuple[Make, list[Any]]


# --- candidates: each makes its inputs and returns (prepare a round, the timed step) -------------


def inputs(
    n: int, v: int, k: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    from nemo_kd.loss import TopK

    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(v, (n,), generator=generator)
    step = v // k  # one id of every stretch of this length
    ids = torch.arange(k) * step + torch.randint(step, (n, k), generator=generator)
    logits = torch.randn(n, k, generator=generator).sort(-1, True).values
    teacher = TopK(ids=ids, logits=logits, logsumexp=torch.full((n,), 6.0))
    shard = torch.empty(n, v // ranks, dtype=dtype).normal_(
        generator=torch.Generator().manual_seed(rank)
    )
    return shard, labels, teacher


def sft_kd(
    n: int, v: int, k: int = 100, dtype: str = "float32", support: str = "bucket"
) -> tuple[Step, Step]:
    from nemo_kd.loss import KDConfig, sft_kd_loss

    shard, labels, teacher = inputs(n, v, k, getattr(torch, dtype))
    leaf = shard.requires_grad_()

    def step() -> None:
        # `view_as`: the memory of a non-leaf may be reused, as in the model.
        result = sft_kd_loss(
            leaf.view_as(leaf),
            labels,
            teacher,
            KDConfig(alpha=0.5, support=support),
            group=torch.distributed.group.WORLD,
            vocab_size=v,
            inplace=True,
        )
        result.loss.mean().backward()

    return fresh(leaf), step


def megatron_cross_entropy(n: int, v: int, dtype: str = "float32") -> tuple[Step, Step]:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    if not parallel_state.model_parallel_is_initialized():
        ranks = torch.distributed.get_world_size()
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    shard, labels, _ = inputs(n, v, 1, getattr(torch, dtype))
    leaf = shard.requires_grad_()

    def step() -> None:
        vocab_parallel_cross_entropy(leaf.view_as(leaf), labels).mean().backward()

    return fresh(leaf), step


def dense_kd_and_cross_entropy(n: int, v: int, k: int = 100) -> tuple[Step, Step]:
    functional = torch.nn.functional
    shard, labels, teacher = inputs(n, v, k)
    leaf = shard.requires_grad_()
    target = torch.full((n, v), -30.0).scatter_(1, teacher.ids, teacher.logits)

    def step() -> None:
        teacher_log = functional.log_softmax(target, -1)
        student_log = functional.log_softmax(leaf, -1)
        kd = functional.kl_div(student_log, teacher_log, reduction="none", log_target=True)
        loss = 0.5 * functional.cross_entropy(leaf, labels) + 0.5 * kd.sum(-1).mean()
        loss.backward()

    return fresh(leaf), step


def fresh(leaf: torch.Tensor) -> Step:
    """Return a step that clears the gradient and redraws the logits, which candidates overwrite."""

    def prepare() -> None:
        leaf.grad = None
        with torch.no_grad():
            leaf.normal_()

    return prepare


def lm_head(n: int, v: int, h: int, fused: bool, dtype: str = "float32") -> tuple[Step, Step]:
    from nemo_kd.loss import KDConfig, linear_sft_kd_loss, sft_kd_loss

    _, labels, teacher = inputs(n, 400, 100)
    kind = getattr(torch, dtype)
    hidden = torch.randn(n, h, dtype=kind).requires_grad_()
    weight = torch.empty(v, h, dtype=kind).normal_(std=0.02).requires_grad_()
    config = KDConfig()

    def step() -> None:
        if fused:
            loss = linear_sft_kd_loss(hidden, weight, labels, teacher, config).loss
        else:
            logits = torch.nn.functional.linear(hidden, weight)
            loss = sft_kd_loss(logits, labels, teacher, config, inplace=True).loss
        loss.mean().backward()

    def prepare() -> None:
        hidden.grad = weight.grad = None

    return prepare, step


# --- measuring ---------------------------------------------------------------------------------


def times(candidates: list[Candidate]) -> list[float]:
    """Return the seconds of each candidate; rounds alternate, so that load affects all alike."""
    made = [make(*arguments) for make, arguments in candidates]
    seconds: list[list[float]] = [[] for _ in made]
    for _ in range(ROUNDS):
        for (prepare, step), taken in zip(made, seconds, strict=True):
            prepare()
            torch.distributed.barrier()
            start = time.perf_counter()
            step()
            taken.append(time.perf_counter() - start)
    return [min(taken) for taken in seconds]


def memory(candidates: list[Candidate]) -> list[float]:
    """Return the growth of the process in bytes; takes one candidate per process."""
    ((make, (n, v, *others)),) = candidates
    for size in ((16, 4096), (n, v)):
        before = peak()
        prepare, step = make(*size, *others)
        for _ in range(2):
            prepare()
            step()
    return [peak() - before - (bytes_of_head(n, v, *others) if make is lm_head else 0)]


def bytes_of_head(n: int, v: int, h: int, _: bool, dtype: str = "float32") -> int:
    """Return the bytes of the LM head's inputs: hidden states and weight."""
    return h * (n + v) * getattr(torch, dtype).itemsize


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rank_main(
    rank: int,
    ranks: int,
    directory: str,
    measure: Callable[[list[Candidate]], list[float]],
    candidates: list[Candidate],
) -> None:
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=ranks
    )
    values = measure(candidates)
    if rank == 0:
        Path(directory, "result.json").write_text(json.dumps(values), encoding="utf-8")
    torch.distributed.destroy_process_group()


def run(
    measure: Callable[[list[Candidate]], list[float]], candidates: list[Candidate], ranks: int
) -> list[float]:
    names = [(make.__name__, *arguments) for make, arguments in candidates]
    print(measure.__name__, names, "on", ranks, file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(rank_main, (ranks, directory, measure, candidates), nprocs=ranks)
        return json.loads(Path(directory, "result.json").read_text(encoding="utf-8"))


def pair(ours: Candidate, peer: Candidate, ranks: int = 1) -> tuple[list[float], list[float]]:
    """Return (seconds, bytes), each as [ours, peer's]."""
    bytes_ = [grown(make, tuple(arguments), ranks) for make, arguments in (ours, peer)]
    return run(times, [ours, peer], ranks), bytes_


@cache
def grown(make: Make, arguments: tuple[Any, ...], ranks: int) -> float:
    """Return the bytes of one candidate, measured once for all of its comparisons."""
    return run(memory, [(make, list(arguments))], ranks)[0]


def compare() -> list[dict[str, Any]]:
    rows = []
    for n, v in SHAPES:
        ours, shape = (sft_kd, [n, v]), f"({n}, {v})"
        for ranks in (1, 2):
            measured = pair(ours, (megatron_cross_entropy, [n, v]), ranks)
            against = f"Megatron's cross-entropy alone, TP {ranks}"
            rows.append(row(shape, against, *measured, 0.75, 1.0))
        half = pair((sft_kd, [n, v, 100, "bfloat16"]), (megatron_cross_entropy, [n, v, "bfloat16"]))
        rows.append(row(shape, "Megatron's, both on bf16 logits", *half, None))
        rows.append(
            row(
                shape,
                "dense KD + cross-entropy",
                *pair(ours, (dense_kd_and_cross_entropy, [n, v])),
                0.25,
            )
        )
    seconds, bytes_ = pair((lm_head, [*HEAD, True]), (lm_head, [*HEAD, False]))
    rows.append(row(str(HEAD), "separate LM head and loss", seconds, bytes_, 1.10))
    rest = [value - 4 * HEAD[1] * HEAD[2] for value in bytes_]
    rows.append(
        row(str(HEAD), "the same, without the weight's gradient", seconds, rest, None, 0.15)
    )
    for what, changed, target in (
        ("half the rows", [256, 49_152], None),
        ("half the vocabulary", [512, 24_576], None),
        ("K = 200 against 100", [512, 49_152, 200], 1.10),
    ):
        measured = pair((sft_kd, changed), (sft_kd, [512, 49_152]))
        rows.append(row("(512, 49152)", what, *measured, target))
    return rows


def row(
    shape: str,
    against: str,
    seconds: list[float],
    bytes_: list[float],
    time_target: float | None,
    memory_target: float | None = None,
) -> dict[str, Any]:
    return {
        "shape": shape,
        "against": against,
        "ms": round(1000 * seconds[0], 1),
        "their_ms": round(1000 * seconds[1], 1),
        "time_ratio": round(seconds[0] / seconds[1], 3),
        "time_target": time_target,
        "mb": round(bytes_[0] / 1e6),
        "their_mb": round(bytes_[1] / 1e6),
        "memory_ratio": round(bytes_[0] / bytes_[1], 3),
        "memory_target": memory_target,
    }


def about_this_run() -> dict[str, str | float]:
    """Describe machine and code."""
    return {
        **machine(),
        "commit": git("rev-parse", "--short", "HEAD"),
        "changed_since": bool(git("status", "--porcelain", "nemo_kd/loss", "benchmarks/loss.py")),
    }


def git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=HERE.parent, check=True, capture_output=True, text=True
    ).stdout.strip()


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="SFT + KD loss, forward + backward, float32, K = 100")
    for column in (
        "shape",
        "against",
        "ms",
        "theirs",
        "ratio",
        "target",
        "MB",
        "theirs",
        "ratio",
        "target",
    ):
        table.add_column(column, justify="left" if column in ("shape", "against") else "right")
    for one in rows:
        table.add_row(*("" if one[key] is None else str(one[key]) for key in KEYS))
    Console(width=130).print(table)


def table_of_page(result: dict[str, Any]) -> str:
    """Return the page's table: each figure, the one it is compared with, and the target."""
    of = result["machine"]
    lines = [
        f"{of['processor']}, {of['cores']} cores, load {of['load']} at the start, "
        f"torch {of['torch']}, commit {of['commit']}, `python benchmarks/loss.py`:",
        "",
        "| shape | against | ms | theirs | ratio | target | MB | theirs | ratio | target |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in result["rows"]:
        lines.append("| " + " | ".join("" if one[key] is None else str(one[key]) for key in KEYS))
        lines[-1] += " |"
    return "\n".join(lines)


def main() -> None:
    about = about_this_run()  # first: the code may change during the run
    rows = compare()
    show(rows)
    result = {"machine": about, "rows": rows}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    write_table(PAGE, "benchmarks/loss.py", table_of_page(result))


if __name__ == "__main__":
    main()
