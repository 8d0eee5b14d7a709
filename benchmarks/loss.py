"""Time and memory of the loss, side by side in one run: ours, Megatron's cross-entropy, dense.

    python benchmarks/loss.py            # a table, and benchmarks/results/loss.json

Each figure is the minimum of several forward + backward passes in a process of its own, so that
its peak memory is its own too: what the process grows by beyond the logits (or, for the LM head,
beyond hidden states and weight) that every candidate is given. float32 on a CPU, K = 100.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

from nemo_kd import cpu

RESULT = Path(__file__).parent / "results" / "loss.json"
SHAPES = ((1024, 49_152), (512, 128_256))
HEAD = (2048, 576, 49_152)
ROUNDS = 7
Step = Callable[[], None]


# --- candidates: each makes its inputs and gives (prepare a round, the timed step) ---------------


def inputs(n: int, v: int, k: int) -> tuple[torch.Tensor, torch.Tensor, Any]:
    from nemo_kd.loss import TopK

    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(v, (n,), generator=generator)
    ids = torch.rand(n, 4 * k, generator=generator).argsort(-1)[:, :k] * (v // (4 * k))
    teacher = TopK(
        torch.randn(n, k, generator=generator).sort(-1, True).values, ids, torch.full((n,), 6.0)
    )
    shard = torch.empty(n, v // ranks).normal_(generator=torch.Generator().manual_seed(rank))
    return shard, labels, teacher


def sft_kd(n: int, v: int, k: int = 100) -> tuple[Step, Step]:
    from nemo_kd.loss import KDConfig, sft_kd_loss

    shard, labels, teacher = inputs(n, v, k)
    leaf = shard.requires_grad_()

    def step() -> None:
        # `view_as` makes it no leaf: then its memory may be reused, as in the model.
        result = sft_kd_loss(
            leaf.view_as(leaf),
            labels,
            teacher,
            KDConfig(),
            group=torch.distributed.group.WORLD,
            vocab_size=v,
            inplace=True,
        )
        result.loss.mean().backward()

    return fresh(leaf), step


def megatron_cross_entropy(n: int, v: int) -> tuple[Step, Step]:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    shard, labels, _ = inputs(n, v, 1)
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
    """Before a round: no gradient, and logits again, since the candidates work in place."""

    def prepare() -> None:
        leaf.grad = None
        with torch.no_grad():
            leaf.normal_()

    return prepare


def lm_head(fused: bool) -> tuple[Step, Step]:
    from nemo_kd.loss import KDConfig, linear_sft_kd_loss, sft_kd_loss

    n, h, v = HEAD
    _, labels, teacher = inputs(n, 400, 100)
    hidden = torch.randn(n, h).requires_grad_()
    weight = (0.02 * torch.randn(v, h)).requires_grad_()
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


CANDIDATES: dict[str, Callable[..., tuple[Step, Step]]] = {
    "sft_kd": sft_kd,
    "megatron": megatron_cross_entropy,
    "dense": dense_kd_and_cross_entropy,
    "lm_head": lm_head,
}


# --- measuring ---------------------------------------------------------------------------------


def measure(
    rank: int, ranks: int, rendezvous: str, output: str, name: str, arguments: list[Any]
) -> None:
    """One candidate in a fresh process (or two): seconds and bytes, written by rank 0."""
    cpu.install()
    from megatron.core import parallel_state

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks
    )
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    torch.ones(64, 64).matmul(torch.ones(64, 64))  # the library's own buffers
    prepare, step = CANDIDATES[name](*arguments)
    before = peak()
    seconds = []
    for _ in range(ROUNDS):
        prepare()
        torch.distributed.barrier()
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        Path(output).write_text(json.dumps({"seconds": min(seconds), "bytes": peak() - before}))
    torch.distributed.destroy_process_group()


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(name: str, *arguments: Any, ranks: int = 1) -> dict[str, float]:
    print(f"{name} {arguments} on {ranks}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as directory:
        output = f"{directory}/result.json"
        values = (ranks, f"{directory}/rendezvous", output, name, list(arguments))
        mp.spawn(measure, values, nprocs=ranks)
        return json.loads(Path(output).read_text())


def compare() -> list[dict[str, Any]]:
    rows = []
    for n, v in SHAPES:
        for ranks in (1, 2):
            ours, peer = run("sft_kd", n, v, ranks=ranks), run("megatron", n, v, ranks=ranks)
            against = f"Megatron's cross-entropy alone, TP {ranks}"
            rows.append(row(f"({n}, {v})", against, ours, peer, 0.80, 1.0))
        ours, peer = run("sft_kd", n, v), run("dense", n, v)
        rows.append(row(f"({n}, {v})", "dense KD + cross-entropy", ours, peer, 0.25, None))
    fused, unfused = run("lm_head", True), run("lm_head", False)
    rows.append(row(str(HEAD), "LM head and loss apart", fused, unfused, 1.15, 0.15))
    base = run("sft_kd", 512, 49_152)
    for what, arguments, target in (
        ("half the rows", (256, 49_152), None),
        ("half the vocabulary", (512, 24_576), None),
        ("K = 200 against 100", (512, 49_152, 200), 1.10),
    ):
        grown = run("sft_kd", *arguments)
        rows.append(row("(512, 49152)", what, grown, base, target, None))
    return rows


def row(
    shape: str,
    against: str,
    ours: dict[str, float],
    peer: dict[str, float],
    time_target: float | None,
    memory_target: float | None,
) -> dict[str, Any]:
    return {
        "shape": shape,
        "against": against,
        "ms": round(1000 * ours["seconds"], 1),
        "their_ms": round(1000 * peer["seconds"], 1),
        "time_ratio": round(ours["seconds"] / peer["seconds"], 3),
        "time_target": time_target,
        "mb": round(ours["bytes"] / 1e6),
        "their_mb": round(peer["bytes"] / 1e6),
        "memory_ratio": round(ours["bytes"] / max(peer["bytes"], 1), 3),
        "memory_target": memory_target,
    }


def machine() -> dict[str, str | int]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), "")
    return {
        "processor": model or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


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
        keys = ("shape", "against", "ms", "their_ms", "time_ratio", "time_target")
        keys += ("mb", "their_mb", "memory_ratio", "memory_target")
        table.add_row(*("" if one[key] is None else str(one[key]) for key in keys))
    Console(width=130).print(table)


def main() -> None:
    rows = compare()
    show(rows)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
