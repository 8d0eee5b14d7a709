"""Compare the time of a dump with the teacher's forward pass, on the demo's teacher and data.

    python benchmarks/dump.py      # a table, and results/dump.json

SmolLM2-135M-Instruct (or `--teacher`, a .nemo) on rows of the demo's data, with the demo's
settings: bf16 autocast, micro-batches of 16, at most 96 tokens per row, K = 100, profile plain.
Three ways alternate over the same micro-batches, and the fastest pass of each counts:

    hidden states   the layers without the LM head
    forward         the model's ordinary forward pass: logits at every position
    dump            a complete dump: fingerprints, reading and tokenizing rows, layers, LM head and
                    top-K at answer tokens, writing the store with checksums and manifest

Tokens are those that the teacher reads, without padding. Target: the dump takes at most 10% longer
than `forward`.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from itertools import count
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.machine import machine
from benchmarks.store import smollm2

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "dump.json"
CACHE = ROOT / "outputs" / "benchmarks"
K, MAX_TOKENS, MICRO_BATCH, PRECISION = 100, 96, 16, "bf16-mixed"


def prepare_files(rows: int) -> tuple[Path, Path]:
    """Make the demo's teacher and `rows` rows of its data, if missing; return their paths."""
    CACHE.mkdir(parents=True, exist_ok=True)
    teacher, data = CACHE / "smollm2.nemo", CACHE / f"rows-{rows}" / "train.jsonl"
    if not teacher.exists():
        _example("convert_hf_to_nemo.py", str(smollm2()), str(teacher))
    if not data.exists():
        _example(
            "demo/make_data.py",
            f"--tokenizer={teacher.with_suffix('.tokenizer')}",
            f"--output-dir={data.parent}",
            f"--train={rows}",
            "--heldout=1",
            f"--max-tokens={MAX_TOKENS}",
        )
    return teacher, data


def _example(name: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(ROOT / "examples" / name), *arguments], check=True)


def configuration(teacher: Path, data: Path) -> DictConfig:
    overrides = [
        f"model.restore_from_path={teacher}",
        f"data.file_path={data}",
        "output_dir=unset",
        f"data.max_seq_length={MAX_TOKENS}",
        f"trainer.precision={PRECISION}",
        f"model.micro_batch_size={MICRO_BATCH}",
        f"dump.top_k={K}",
        "++teacher.kind=nemo",
    ]
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return compose("dump_teacher_topk", overrides)


def bare_forward(teacher: Any, cfg: DictConfig, *, logits: bool) -> Callable[[], int]:
    """Return a function that runs the model on the dump's micro-batches and counts tokens read."""
    from nemo_kd.cli.teacher import read
    from nemo_kd.mcore.lm_head import gpt_module, split_lm_head
    from nemo_kd.teacher.dump import calls
    from nemo_kd.teacher.rows import sft_rows

    model = teacher.model
    gpt = gpt_module(model.model)
    found = sft_rows(read(cfg), teacher)
    rows = [found[row] for row in range(len(found))]
    size, pad_to = cfg.rows_per_shard, 16
    batches = []
    for start in range(0, len(rows), size):
        for call, _ in calls(rows[start : start + size], MICRO_BATCH, sys.maxsize, 1):
            length = -(-(max(map(len, call)) - 1) // pad_to) * pad_to
            tokens = torch.zeros(len(call), length, dtype=torch.int64)
            for b, row in enumerate(call):
                tokens[b, : len(row) - 1] = torch.from_numpy(row.input_ids[:-1].astype("int64"))
            batches.append((tokens, torch.arange(length).expand(len(call), -1)))
    config, device = gpt.config, torch.cuda.current_device()

    def forward() -> None:
        for tokens, positions in batches:
            with torch.autocast("cuda", config.autocast_dtype, enabled=config.enable_autocast):
                model.model(
                    input_ids=tokens.to(device),
                    position_ids=positions.to(device),
                    attention_mask=None,
                    labels=None,
                )
        torch.cuda.synchronize()

    @torch.no_grad()
    def run() -> int:
        if logits:
            forward()
        else:
            with split_lm_head(gpt):
                forward()
        return sum(len(row) - 1 for row in rows)

    return run


def whole_dump(teacher: Any, cfg: DictConfig, directory: Path) -> Callable[[], int]:
    """Return a function that makes a complete dump into a new store, and counts tokens read."""
    from nemo_kd.cli.teacher import read
    from nemo_kd.teacher.dump import dump

    names = count()

    def run() -> int:
        cfg.output_dir = str(directory / f"store-{next(names)}")
        said = io.StringIO()
        with redirect_stdout(said), redirect_stderr(said):
            manifest = dump(read(cfg), teacher)
        assert manifest is not None
        return manifest.totals["tokens"] - manifest.totals["samples"]

    return run


def measure(ways: dict[str, Callable[[], int]], rounds: int) -> list[dict[str, Any]]:
    """Time each way once per round, so that load on the machine affects all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    tokens = {name: way() for name, way in ways.items()}  # also warms up memory
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    assert len(set(tokens.values())) == 1, tokens
    best = {name: min(times) for name, times in seconds.items()}
    return [
        {
            "way": name,
            "seconds": round(best[name], 3),
            "tokens_per_s": round(tokens[name] / best[name]),
            "times_forward": round(best[name] / best["forward"], 3),
        }
        for name in ways
    ]


def show(found: list[dict[str, Any]], title: str) -> None:
    table = Table(title=title)
    for name in ("way", "seconds", "tokens/s", "× forward"):
        table.add_column(name, justify="left" if name == "way" else "right")
    for row in found:
        cells = (f"{row['seconds']:.2f}", f"{row['tokens_per_s']:,}", f"{row['times_forward']:.2f}")
        table.add_row(row["way"], *cells)
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path, help="a .nemo; default: the demo's")
    parser.add_argument("--data", type=Path, help="SFT JSONL; default: rows of the demo's")
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    teacher, data = prepare_files(options.rows)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # NeMo's data set forks
    cfg = configuration(options.teacher or teacher, options.data or data)
    from nemo_kd.cli.teacher import load, read

    teacher = load(read(cfg), cfg)
    with tempfile.TemporaryDirectory(dir=CACHE) as directory:
        ways = {
            "hidden states": bare_forward(teacher, cfg, logits=False),
            "forward": bare_forward(teacher, cfg, logits=True),
            "dump": whole_dump(teacher, cfg, Path(directory)),
        }
        found = measure(ways, options.rounds)
        from nemo_kd.store import Store

        totals = Store(cfg.output_dir).manifest.totals
    where = machine()
    rows, answers = totals["samples"], totals["answer_tokens"]
    tokens = totals["tokens"] - rows
    show(found, f"{tokens:,} tokens, {answers:,} of them in answers")
    print(f"{where['processor']}, {where['cores']} cores, load {where['load']} in the last minute")
    result = {
        "machine": where,
        "teacher": Path(cfg.model.restore_from_path).name,
        "precision": PRECISION,
        "top_k": K,
        "rows": rows,
        "tokens": tokens,
        "answer_tokens": answers,
        "ways": found,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
