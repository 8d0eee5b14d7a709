"""What is compared: a `Run` is one student, an `Experiment` a list of runs with a question.

A run's name is made of its settings alone, so that experiments share the runs they have in common.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

TIMED = "timed/step_seconds.json"  # below the results
USUAL = ("bucket", "forward_kl", "plain-100", "tuned")  # not said in a run's name


@dataclass(frozen=True)
class Run:
    """Settings of one student. `lr=None`: the one chosen for its family on the validation split."""

    domain: str = "code"
    layers: int = 8
    """30: the teacher itself, which is only measured."""
    teacher: str = "tuned"
    """`tuned`: fine-tuned on the training split first; `stock`: as it comes."""
    store: str = "plain-100"
    """The teacher's logits, `<profile>-<size>`: see `assets.store_steps`."""
    answers: str = "original"
    """`original`, `teacher`: written by the teacher for the same prompts, or `both`."""
    alpha: float = 0.5
    support: str = "bucket"
    divergence: str = "forward_kl"
    lr: float | None = None
    seed: int = 1
    """Order of the training samples, of every epoch; nothing else is random."""
    length: float = 1.0
    """Steps, as a share of the setting's; 0: measured untrained."""

    @property
    def family(self) -> str:
        """Runs of a family have their learning rate in common."""
        if self.alpha == 0:
            return "sft"
        if self.alpha == 1:
            return "alone"
        return self.support

    @property
    def name(self) -> str:
        """Unique and stable; the directory of the run."""
        if self.length == 0:
            return "-".join((self.domain, f"l{self.layers}", self.teacher, "untrained"))
        if self.lr is None:
            raise ValueError("a run has a name once its learning rate is chosen")
        parts = [self.domain, f"l{self.layers}"]
        if self.alpha == 0:
            parts.append("sft")
        else:
            objective = (self.support, self.divergence, self.store, self.teacher)
            parts += [f"kd{self.alpha:g}", *(p for p in objective if p not in USUAL)]
        parts += [] if self.answers == "original" else [f"answers-{self.answers}"]
        parts += [f"lr{self.lr:g}", f"s{self.seed}"]
        parts += [] if self.length == 1 else [f"x{self.length:g}"]
        return "-".join(parts)

    def steps(self, of: int) -> int:
        """Training steps, where the setting has `of`."""
        return round(of * self.length)


@dataclass(frozen=True)
class Experiment:
    """Runs that answer one question."""

    name: str
    title: str
    question: str
    runs: Mapping[str, tuple[Run, ...]]
    """Label in the report → the runs of its seeds."""
    baseline: str | None
    """The label that the others are compared with."""
    generate: bool = False
    """Also let each student write the held-out functions."""

    def all_runs(self) -> list[Run]:
        return [run for runs in self.runs.values() for run in runs]


def read_run(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> Run:
    """Errors: ValueError for a setting that `Run` does not have."""
    known = {field.name for field in dataclasses.fields(Run)}
    if unknown := sorted({*base, *overrides} - known):
        raise ValueError(f"unknown settings of a run: {', '.join(unknown)}; known: {sorted(known)}")
    return Run(**{**base, **overrides})


def read_experiments(cfg: DictConfig) -> list[Experiment]:
    """`cfg.experiments` in its order, which is the queue's."""
    base: Any = OmegaConf.to_container(cfg.run, resolve=True)
    content: Any = OmegaConf.to_container(cfg.experiments, resolve=True)
    experiments = []
    for name, block in content.items():
        shared = {**base, **block.get("shared", {})}
        runs = {
            label: tuple(
                dataclasses.replace(read_run(shared, overrides or {}), seed=seed)
                for seed in block["seeds"]
            )
            for label, overrides in block["runs"].items()
        }
        experiments.append(
            Experiment(
                name=name,
                title=block["title"],
                question=block["question"],
                runs=runs,
                baseline=block.get("baseline"),
                generate=block.get("generate", False),
            )
        )
    return experiments


def read_choices(cfg: DictConfig) -> Experiment:
    """One setting at a time, each at the seed that the learning rates were chosen with."""
    base: Any = OmegaConf.to_container(cfg.run, resolve=True)
    content: Any = OmegaConf.to_container(cfg.choices.runs, resolve=True)
    runs = {
        label: (dataclasses.replace(read_run(base, overrides), seed=cfg.tuned_on.seed),)
        for label, overrides in content.items()
    }
    return Experiment("choices", "What each choice costs", "", runs, baseline=list(runs)[1])
