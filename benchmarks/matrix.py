"""Twenty steps from one store on every version of NeMo and Megatron-core, on every layout.

    python benchmarks/matrix.py       # a table, benchmarks/results/matrix.json, docs/support.md

Environments are overlays over the one that runs this (see `environments.py`), kept with everything
finished in `--directory`: the same command resumes. Megatron-core trains a GPTModel of 4 layers in
`examples/megatron_core/train.py`, from the same weights on every layout; NeMo the tests' student
in `examples/train_gpt_sft_kd.py`. Losses are compared with one process of the first version; a step
has three or four of them. Both dump the same `.nemo`; a store is compared with that of the first
version on the same layout.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.environments import Environment, Made, MissingPython, make
from benchmarks.layouts import PAGE, STEPS, World, losses, world
from benchmarks.machine import machine
from benchmarks.pages import write_table
from tests.layouts.conftest import LAYOUTS, train_overrides
from tests.mcore.conftest import make as make_teachers
from tests.mcore.test_teacher import overrides as dump_overrides
from tests.processes import DUMP, TRAIN, Done, run_program

PROGRAM = "benchmarks/matrix.py"
RESULT = Path(__file__).parent / "results" / "matrix.json"
LIMIT = 1e-5  # nats
ONE = "1 process"
# Column → (processes, options of the example; the layout of NeMo's trainings in LAYOUTS).
COLUMNS: dict[str, tuple[int, list[str], str | None]] = {
    ONE: (1, [], "one"),
    "TP 2, SP": (2, ["--tensor-parallel=2", "--sequence-parallel"], "tp2sp"),
    "PP 2": (2, ["--pipeline-parallel=2"], "pp2"),
    "VPP 2 × 2": (2, ["--pipeline-parallel=2", "--virtual-pipeline=2"], None),  # NeMo refuses it
    "DP 2": (2, [], "dp2"),
}
DUMPS = {"dump": "one", "dump, TP 2, SP": "tp2sp", "dump, PP 2": "pp2"}  # column → layout
ENVIRONMENTS = [
    Environment(("megatron-core==0.13.1",)),
    Environment(("megatron-core==0.14.0",)),
    Environment(("megatron-core==0.16.1",)),
    Environment(("megatron-core==0.19.2",), python=(3, 12)),
    Environment(("nemo_toolkit==2.4.1", "megatron-core==0.13.1", "transformers==4.51.3")),
    Environment(
        ("nemo_toolkit==2.5.0", "megatron-core==0.14.0", "transformers==4.53.3", "h5py==3.16.0")
    ),
]
Cells = dict[str, Any]
"""Column → losses [steps, number], or the SHA-256 of a store; "error" if it could not be had."""


@dataclass(frozen=True)
class Runner:
    """Runs the cells of one environment in `directory`, which keeps the finished ones."""

    environment: Environment
    made: Made
    world: World
    directory: Path

    def cells(self) -> Cells:
        return {name: self._cell(name, run) for name, run in self._runs().items()}

    def _runs(self) -> dict[str, Callable[[], Any]]:
        runs: dict[str, Callable[[], Any]] = {}
        for name, (processes, options, layout) in COLUMNS.items():
            if not self.environment.is_nemo:
                runs[name] = partial(self._megatron, options, processes)
            elif layout is not None:
                runs[name] = partial(self._nemo, layout)
        return runs | {name: partial(self._dump, layout) for name, layout in DUMPS.items()}

    def _cell(self, name: str, run: Callable[[], Any]) -> Any:
        kept = self.directory / f"{name}.json"
        if kept.exists():
            return json.loads(kept.read_text(encoding="utf-8"))
        print(f"{self.environment.name}: {name}", flush=True)
        try:
            found = run()
        except AssertionError as error:  # of a program that failed
            lines = [line for line in str(error).splitlines() if line.strip()]
            return {"error": lines[-1] if lines else "failed"}
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found), encoding="utf-8")
        return found

    def _megatron(self, options: list[str], processes: int) -> list[list[float]]:
        arguments = [f"--store={self.world.train}", f"--steps={STEPS}", *options]
        done = self._run("tests/layouts/same_weights.py", *arguments, processes=processes)
        lines = [line for line in done.stdout.splitlines() if line.startswith("step ")]
        assert len(lines) == STEPS, done.stdout
        return [
            [float(part.split()[-1]) for part in line.split(": ")[1].split(", ")] for line in lines
        ]

    def _nemo(self, layout: str) -> list[list[float]]:
        run = self.directory / f"run-{layout}"
        shutil.rmtree(run, ignore_errors=True)
        processes, overrides = LAYOUTS[layout]
        base = train_overrides(*self.world, run)
        self._run(TRAIN, *base, *overrides, f"trainer.max_steps={STEPS}", processes=processes)
        found: list[list[float]] = losses(run).tolist()
        return found

    def _dump(self, layout: str) -> str:
        store = self.directory / f"store-{layout}"
        shutil.rmtree(store, ignore_errors=True)
        processes, overrides = LAYOUTS[layout]
        kind = "nemo" if self.environment.is_nemo else "mcore"
        base = dump_overrides(kind, teacher(self.directory.parent), store)
        self._run(DUMP, *base, *overrides, processes=processes)
        return digest(store)

    def _run(self, program: str, *arguments: str, processes: int) -> Done:
        return run_program(
            program,
            *arguments,
            processes=processes,
            python=self.made.python,
            PYTHONPATH=self.made.path,
        )


def teacher(directory: Path) -> Path:
    """Return the `.nemo` that is dumped, with a Hugging Face tokenizer; made once."""
    made = directory / "teachers"
    if not made.exists():
        unfinished = directory / "teachers.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        make_teachers(unfinished)
        unfinished.rename(made)
    return made / "untied_llama3.nemo"


def digest(store: Path) -> str:
    """SHA-256 of the names and bytes of all files of a store."""
    found = hashlib.sha256()
    for path in sorted(path for path in store.rglob("*") if path.is_file()):
        found.update(f"{path.relative_to(store)}\0".encode() + path.read_bytes())
    return found.hexdigest()


def compared(cells: Cells, trained: Cells, dumped: Cells) -> Cells:
    """Column → largest difference of a loss from one process of `trained`; whether a store is that
    of `dumped`.

    Errors stay as they are.
    """
    references = {name: dumped[name] if name in DUMPS else trained[ONE] for name in cells}
    return {name: _compared(found, references[name]) for name, found in cells.items()}


def _compared(found: Any, reference: Any) -> Any:
    if isinstance(found, dict):
        return found
    if isinstance(reference, dict):
        return {"error": f"nothing to compare with: {reference['error']}"}
    if isinstance(found, str):
        return bool(found == reference)
    mine, theirs = (torch.tensor(losses, dtype=torch.float64) for losses in (found, reference))
    return float((mine - theirs).abs().max())


def measured(directory: Path, newer: str | None) -> list[dict[str, Any]]:
    """Run all environments; return a row for each."""
    made_world = world(directory)
    rows: list[dict[str, Any]] = []
    first: dict[bool, Cells] = {}  # of Megatron-core, and of NeMo
    for environment in ENVIRONMENTS:
        row: dict[str, Any] = {"environment": environment.name}
        rows.append(row)
        try:
            made = make(environment, directory, newer)
        except MissingPython as error:
            row["missing"] = str(error)
            continue
        where = directory / environment.name.replace(" ", "-")
        cells = Runner(environment, made, made_world, where).cells()
        trained = first.setdefault(environment.is_nemo, cells)
        row |= {"versions": made.versions, "cells": compared(cells, trained, first[False])}
    return rows


def shown(row: dict[str, Any], column: str) -> str:
    found = row.get("cells", {}).get(column)
    if isinstance(found, bool):
        return "same bytes" if found else "**other bytes**"
    if isinstance(found, dict):
        return "**fails**"
    if found is None:
        return "not run" if "missing" in row else ""
    return f"{found:.1e}" if found else "0"


def table_of_page(result: dict[str, Any]) -> str:
    columns = [*COLUMNS, *DUMPS]
    of = result["machine"]
    lines = [
        f"{of['processor']}, {STEPS} steps, `make matrix`:",
        "",
        f"| version | Python, torch | {' | '.join(columns)} |",
        f"|---|---|{'---:|' * len(columns)}",
    ]
    for row in result["rows"]:
        versions = row.get("versions")
        stack = f"{versions['python']}, {versions['torch']}" if versions else ""
        cells = " | ".join(shown(row, column) for column in columns)
        lines.append(f"| {row['environment']} | {stack} | {cells} |")
    return "\n".join(lines)


def faults(rows: Iterable[dict[str, Any]]) -> list[str]:
    """What is missing, fails or differs: a line each."""
    found = []
    for row in rows:
        found += [row["missing"]] if "missing" in row else []
        for column, cell in row.get("cells", {}).items():
            where = f"{row['environment']}, {column}"
            if isinstance(cell, dict):
                found.append(f"{where}: {cell['error']}")
            elif cell is False:
                found.append(f"{where}: the store has other bytes than the first version's")
            elif not isinstance(cell, bool) and cell > LIMIT:
                found.append(f"{where}: a loss differs by {cell:.1e}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=Path("outputs/matrix"))
    parser.add_argument("--python312", help="Python 3.12 with torch and nemo-kd[hf], not a new one")
    options = parser.parse_args()
    rows = measured(options.directory.resolve(), options.python312)
    result: dict[str, Any] = {"machine": machine(), "rows": rows}
    table = Table(title=f"{STEPS} steps, compared with one process of the first version")
    for column in ("version", *COLUMNS, *DUMPS):
        table.add_column(column)
    for row in rows:
        table.add_row(row["environment"], *(shown(row, column) for column in [*COLUMNS, *DUMPS]))
    Console(width=120).print(table)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    write_table(PAGE, PROGRAM, table_of_page(result))
    for fault in faults(rows):
        print(fault, file=sys.stderr)
    return 1 if faults(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
