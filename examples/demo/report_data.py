"""Read the results of the demo's steps for the report."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_kd.store import Store

# Name in the directory → name in the report, in the order of all tables.
MODELS = {
    "teacher": "Teacher",
    "student": "Student before training",
    "sft": "SFT",
    "kd": "KD + SFT",
}
STUDENTS = ("sft", "kd")
METRICS = ("sft_loss", "kd_loss", "top1_agreement")
PACKAGES = ("nemo-kd", "nemo_toolkit", "megatron-core", "lightning", "torch", "transformers")


class MissingStepError(FileNotFoundError):
    """A step of the demo has not been run."""


@dataclass(frozen=True)
class Curve:
    """One metric over the steps."""

    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class Run:
    """The lines of a `metrics.jsonl`: training steps and validations, by step."""

    training: dict[int, dict[str, float]]
    validation: dict[int, dict[str, float]]

    def train(self, metric: str) -> Curve:
        """Return a training metric of every step."""
        rows = {step: row[metric] for step, row in self.training.items() if metric in row}
        return Curve(list(rows), list(rows.values()))

    def held_out(self, metric: str) -> Curve:
        """Return a metric of the first validation set, at every validation."""
        rows = {step: figure(row, metric, "val/") for step, row in self.validation.items()}
        return Curve(list(rows), list(rows.values()))

    @property
    def seconds_per_step(self) -> float:
        """Median time of a training step."""
        return statistics.median(self.train("train_step_timing in s").values)


@dataclass(frozen=True)
class Demo:
    """Everything the report shows."""

    runs: dict[str, Run]
    evaluation: dict[str, dict[str, float]]
    """Model → metric → value over all held-out answer tokens."""
    completions: dict[str, Any]
    exported: dict[str, Any]
    """The student in transformers, as `check_export.py` writes it."""
    steps: dict[str, dict[str, Any]]
    """Title → command and seconds, in the order they ran."""
    data: dict[str, Any]
    layers: dict[str, Any]
    store: Store
    """The training data with the teacher's logits."""


def figure(row: dict[str, float], metric: str, prefix: str = "") -> float:
    """Return the value of `<prefix><set>/<metric>` for the first set that has it."""
    keys = sorted(k for k in row if k.startswith(prefix) and k.endswith(f"/{metric}"))
    if not keys:
        raise MissingStepError(
            f"no figure {prefix}<set>/{metric} among {', '.join(sorted(row))}; "
            "it is only logged for validation data from a store"
        )
    return row[keys[0]]


def read_run(path: Path) -> Run:
    """Read a run's `metrics.jsonl`, and those that NeMo moved to `run_N` when it resumed.

    Later lines of a step replace earlier ones.
    """
    earlier = path.parent.glob("run_*/metrics.jsonl")
    parts = [*sorted(earlier, key=lambda part: int(part.parent.name[4:])), path]
    training: dict[int, dict[str, float]] = {}
    validation: dict[int, dict[str, float]] = {}
    for line in "".join(map(_read, parts)).splitlines():
        row = json.loads(line)
        is_validation = any(key.startswith("val") for key in row)
        (validation if is_validation else training)[int(row.pop("step"))] = row
    return Run(dict(sorted(training.items())), dict(sorted(validation.items())))


def read_demo(directory: Path) -> Demo:
    """Read `directory` as `run.py` fills it."""
    evaluation = {}
    for name in MODELS:
        row = json.loads(_read(directory / "evaluation" / f"{name}.json"))
        evaluation[name] = {metric: figure(row, metric) for metric in METRICS}
    return Demo(
        runs={name: read_run(directory / "runs" / name / "metrics.jsonl") for name in STUDENTS},
        evaluation=evaluation,
        completions=json.loads(_read(directory / "completions.json")),
        exported=json.loads(_read(directory / "exported.json")),
        steps=json.loads(_read(directory / "steps.json")),
        data=json.loads(_read(directory / "data.json")),
        layers=json.loads(_read(directory / "layers.json")),
        store=Store(directory / "store-train"),
    )


def _read(path: Path) -> str:
    if not path.is_file():
        raise MissingStepError(f"{path} is missing: the demo's step that writes it has not run")
    return path.read_text(encoding="utf-8")


def versions() -> dict[str, str]:
    """Return the installed versions of the main packages."""
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        found[package] = importlib.metadata.version(package)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    if commit.returncode == 0:
        found["commit"] = commit.stdout.strip()
    return found


def machine() -> str:
    """Describe processor, cores, memory and operating system."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = (
        cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        if cpuinfo.is_file()
        else []
    )
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.machine()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{processor}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}"
