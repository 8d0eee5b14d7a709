"""Write the tables of `scale.md` from the estimates of `nemo-kd plan`.

    python docs/scale.py

rewrites the page between its markers `<!-- scale NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from nemo_kd.cli.render import size
from nemo_kd.store.spec import StoreSpec
from nemo_kd.teacher.plan import Plan, Workload, plan
from nemo_kd.teacher.scale import Cluster, Scale, scale

PAGE = Path(__file__).parent / "scale.md"
MARKED = re.compile(r"(<!-- scale (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
TOKENS = 1e12
VOCABULARY = 128_256
CLUSTER = Cluster(hours_between_failures=4, training_ranks=4096)
PROFILES: dict[str, tuple[str, int, float | None]] = {
    "`plain`, K = 100": ("plain", 100, None),
    "`compact`, K = 100": ("compact", 100, None),
    "`top_p`, 46 ids per token": ("top_p", 100, 46),
    "`sampled`, 40 draws": ("sampled", 40, None),
}
TEACHERS = {"8B": (8e9, 1, 1), "70B": (70e9, 8, 1), "405B": (405e9, 8, 2)}
"""Parameters, tensor and pipeline parallel size."""
GPUS = (256, 1024, 4096)
ROWS_PER_SHARD = (256, 4096, 65_536)
ANSWERS = (300, 2000, 8000)


def with_tables(page: str) -> str:
    """Return the page with tables made from the current code."""
    return MARKED.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}{found[3]}", page)


def estimate(
    profile: str = "`compact`, K = 100",
    teacher: str = "405B",
    gpus: int = 4096,
    rows: int = 4096,
    answer: int = 300,
) -> tuple[Plan, Scale]:
    """Return the estimates for a store of TOKENS answer tokens, and as many of prompts."""
    name, top_k, kept = PROFILES[profile]
    parameters, tensor, pipeline = TEACHERS[teacher]
    options = {"p": 1.0} if name == "top_p" else {}
    spec = StoreSpec(
        top_k=top_k,
        vocab_size=VOCABULARY,
        profile=name,
        profile_options=options,
        rows_per_shard=rows,
    )
    work = Workload(
        answer_tokens=TOKENS,
        total_tokens=2 * TOKENS,
        samples=TOKENS / answer,
        teacher_parameters=parameters,
        gpus=gpus,
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
    )
    planned = plan(spec, work, kept)
    return planned, scale(spec, work, planned, CLUSTER)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table whose columns after the first are right-aligned."""
    names = list(head)
    lines = [names, ["---", *["--:"] * (len(names) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def profiles() -> str:
    """Size and files by profile."""
    rows = []
    for name in PROFILES:
        planned, large = estimate(name)
        each = f"{planned.bytes_per_answer_token:.0f}"
        counts = f"{large.segments:,}", f"{large.files:,}"
        rows.append([name, each, size(planned.disk_bytes), *counts, size(large.manifest_bytes)])
    head = ["profile", "bytes per answer token", "disk", "segments", "files", "manifest"]
    return table(head, rows)


def teachers() -> str:
    """Days of a dump by teacher and GPUs, with failures, and the number of restarts."""
    rows = []
    for name, (_, tensor, pipeline) in TEACHERS.items():
        cells = []
        for gpus in GPUS:
            _, large = estimate(teacher=name, gpus=gpus)
            cells.append(f"{large.dump_seconds / 86400:,.1f} d, {large.failures:,.0f}")
        rows.append([f"{name}, TP {tensor}, PP {pipeline}", *cells])
    return table(["teacher", *(f"{gpus:,} GPUs" for gpus in GPUS)], rows)


def shards() -> str:
    """What the rows of a shard decide, for the largest teacher."""
    rows = []
    for count in ROWS_PER_SHARD:
        planned, large = estimate(rows=count)
        lost = f"{large.lost_seconds_per_failure / 60:.1f} min"
        more = f"{large.dump_seconds / planned.dump_seconds - 1:.1%}"
        rows.append([f"{count:,}", f"{large.files_while_dumping:,}", lost, more])
    return table(["rows per shard", "files while dumping", "lost per failure", "longer by"], rows)


def opening() -> str:
    """What is read to open the store, by length of the answers."""
    rows = []
    for answer in ANSWERS:
        _, large = estimate(answer=answer)
        cells = f"{TOKENS / answer / 1e6:,.0f} M", size(large.index_bytes)
        cells = *cells, size(large.opening_bytes_per_node), size(large.opening_bytes)
        rows.append([f"{answer:,}", *cells])
    return table(["tokens per answer", "samples", "`index.bin`", "per node", "512 nodes"], rows)


def epoch() -> str:
    """Traffic of the first epoch of a remote store."""
    rows = []
    for name in PROFILES:
        _, large = estimate(name)
        own, shared = large.epoch_bytes_own_caches, large.epoch_bytes_shared_cache
        rows.append([name, size(own), size(shared)])
    return table(["profile", "a cache on each of 512 nodes", "one shared cache"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "profiles": profiles,
    "teachers": teachers,
    "shards": shards,
    "opening": opening,
    "epoch": epoch,
}

if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
