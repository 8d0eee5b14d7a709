"""Compare twenty steps of the same training on every layout with one process.

    python benchmarks/layouts.py      # a table, benchmarks/results/layouts.json, docs/support.md

The tests' tiny student (4 layers of width 32, vocabulary 500, float32, RMSNorm, RoPE, tied
embeddings) on the store of its tiny teacher: 4 samples per step, AdamW, learning rate 0.01.
Losses are a step's SFT, KD and total losses; weights are the full tensors that the run saved,
without the vocabulary's padding, which differs between layouts and is never trained.
AdamW divides each gradient by its own magnitude: where that is nearly zero, rounding errors are
amplified, and weights differ more than losses.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.machine import machine
from benchmarks.pages import write_table
from tests.conftest import make_tiny
from tests.layouts.conftest import LAYOUTS, dump_overrides, train_overrides
from tests.processes import run_script
from tests.runs import steps
from tests.tiny import VOCABULARY

HERE = Path(__file__).parent
RESULT = HERE / "results" / "layouts.json"
PAGE = HERE.parent / "docs" / "support.md"
PROGRAM = "benchmarks/layouts.py"
STEPS = 20
LOSSES = ("reduced_train_loss", "loss", "sft_loss", "kd_loss")
GLOBAL = "+model.kd.normalize=global_tokens"


class Row(NamedTuple):
    """A training, and the overrides of the one-process training that it is compared with."""

    name: str
    layout: str
    overrides: tuple[str, ...] = ()
    reference: tuple[str, ...] = ()


ROWS = [
    Row("TP 2", "tp2"),
    Row("TP 4", "tp4"),
    Row("TP 2, sequence parallel", "tp2sp"),
    Row("PP 2", "pp2"),
    Row("DP 2", "dp2"),
    Row("DP 2, Megatron's distributed optimizer", "dp2dist"),
    Row("TP 2 × PP 2", "tp2pp2"),
    Row("LM head fused with the loss", "one", ("+model.kd.fused_lm_head=true",)),
    Row(
        "`global_tokens`: 2 micro-batches of 2, not 4 of 1",
        "one",
        (GLOBAL, "model.micro_batch_size=2"),
        (GLOBAL,),
    ),
    Row(
        "`global_tokens`: DP 2, a micro-batch of 2 each, not 4 of 1",
        "dp2",
        (GLOBAL, "model.micro_batch_size=2"),
        (GLOBAL,),
    ),
]
Train = Callable[..., Path]
"""(layout, *overrides) → directory of the run."""


def compare(train: Train, row: Row) -> dict[str, Any]:
    """Return the largest differences of losses and of final weights from one process."""
    length = f"trainer.max_steps={STEPS}"
    one = train("one", *row.reference, length)
    other = train(row.layout, *row.overrides, length)
    mine, theirs = weights(one), weights(other)
    assert set(mine) == set(theirs)
    return {
        "layout": row.name,
        "loss": float((losses(one) - losses(other)).abs().max()),
        "weights": max(float((mine[key] - theirs[key]).abs().max()) for key in mine),
        "learned": float(losses(one)[0, 1] - losses(one)[-1, 1]),
    }


def losses(run: Path) -> torch.Tensor:
    """Return the losses of a run, [steps, LOSSES]."""
    lines = steps(run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return torch.tensor([[line[name] for name in LOSSES] for line in lines], dtype=torch.float64)


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Return the full tensors of a run's last `.nemo`, whatever layout wrote them."""
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    (path,) = (run / "checkpoints").glob("*.nemo")
    with tempfile.TemporaryDirectory() as directory:
        with tarfile.open(path) as archive:
            archive.extractall(directory, filter="data")
        reader = FileSystemReader(Path(directory) / "model_weights")
        tensors = {
            key: torch.empty(about.size, dtype=about.properties.dtype)
            for key, about in reader.read_metadata().state_dict_metadata.items()
            if isinstance(about, TensorStorageMetadata)
        }
        load(tensors, storage_reader=reader, no_dist=True)
    by_vocabulary = ("word_embeddings.weight", "output_layer.weight")
    return {
        key: tensor[:VOCABULARY] if key.endswith(by_vocabulary) else tensor
        for key, tensor in tensors.items()
    }


class World(NamedTuple):
    """The tests' models and rows in `tiny`, and the stores of their teacher."""

    tiny: Path
    train: Path
    heldout: Path


def world(directory: Path) -> World:
    """Make models and stores in `directory`, if they are not there."""
    made = World(directory / "tiny", directory / "train", directory / "heldout")
    if not (made.tiny / "teacher.nemo").exists():
        made.tiny.mkdir(parents=True)
        make_tiny(made.tiny)
    for store in (made.train, made.heldout):
        run_script("dump_teacher_topk.py", *dump_overrides(made.tiny, store.name, store))
    return made


def trainings(directory: Path) -> Train:
    """Make models and stores in `directory`; return a function that trains there, if not done."""
    made = world(directory)

    def train(layout: str, *more: str) -> Path:
        name = "".join(c if c.isalnum() else "-" for c in "-".join([layout, *more]))
        run = directory / name
        if not list(run.glob("checkpoints/*.nemo")):
            shutil.rmtree(run, ignore_errors=True)
            processes, overrides = LAYOUTS[layout]
            base = train_overrides(*made, run)
            run_script("train_gpt_sft_kd.py", *base, *overrides, *more, processes=processes)
        return run

    return train


def table_of_page(result: dict[str, Any]) -> str:
    of = result["machine"]
    lines = [
        f"{of['processor']}, torch {of['torch']}, {STEPS} steps, `python benchmarks/layouts.py`:",
        "",
        "| layout | losses differ by at most | final weights differ by at most |",
        "|---|---:|---:|",
    ]
    for row in result["rows"]:
        lines.append(f"| {row['layout']} | {row['loss']:.1e} | {row['weights']:.1e} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, help="directory to keep and resume trainings in")
    options = parser.parse_args()
    table = Table(title=f"{STEPS} steps, largest differences from one process")
    for column in ("layout", "losses", "final weights"):
        table.add_column(column)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        train = trainings(options.directory or Path(temporary))
        for row in ROWS:
            rows.append(compare(train, row))
            table.add_row(row.name, f"{rows[-1]['loss']:.1e}", f"{rows[-1]['weights']:.1e}")
    Console(width=100).print(table)
    result = {"machine": machine(), "rows": rows}
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    write_table(PAGE, PROGRAM, table_of_page(result))


if __name__ == "__main__":
    main()
