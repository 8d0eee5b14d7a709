"""The units of comparison: a `Run` trains one student, an `Experiment` is a question and its runs.

A run's name is made only of its settings, so that experiments share common runs.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, cast

from omegaconf import DictConfig, OmegaConf

from nemo_kd.errors import NemoKDError
from nemo_kd.settings.blocks import FREE, Block, check
from nemo_kd.settings.dataclass import settings_of
from nemo_kd.settings.values import (
    COUNT,
    FLAG,
    MAPPING,
    NATURAL,
    PATH,
    PRECISION,
    SHARE,
    TEXT,
    list_of,
    number,
    one_of,
    one_or_more,
    optional,
)
from nemo_kd.spelling import did_you_mean

TIMED = "timed/step_seconds.json"  # below the results
REPEATED = "repeated"
"""Directory of runs of a second clone, beside the results."""
USUAL = ("bucket", "forward_kl", "plain-100", "tuned")  # not said in a run's name
DOMAINS = ("code", "prose", "math", "worded")
TEACHER_LAYERS = 30
ALSO = ("generation", "knowledge", "doctests", "confidence")
"""What can be measured beyond the losses: entries of the result file."""
SHAPING = ("data", "train", "teacher", "student_from", "generation")
"""Blocks of the configuration that shape a result and are not part of its run's name."""

RATE, SECONDS = number(0, above=True), number(0)
SETTINGS = Block(
    {
        "out": PATH,
        "results": PATH,
        "threads": COUNT,
        "only": optional(one_or_more(TEXT)),
        "max_hours": optional(SECONDS),
        "list": FLAG,
        "data": Block(
            {
                "packages": optional(list_of(TEXT)),
                "several_wordings": FLAG,
                "seed": NATURAL,
                **dict.fromkeys(("train", "valid", "test", "groups", "max_tokens"), COUNT),
            }
        ),
        "train": Block(
            {
                **dict.fromkeys(("steps", "batch", "micro_batch", "validate_every"), COUNT),
                "warmup": NATURAL,
                "precision": PRECISION,
            }
        ),
        "teacher": Block({"steps": COUNT, "lr": RATE, "top_k": COUNT}),
        "rounds": Block({"prompts": COUNT, "steps": COUNT, "lr": RATE}),
        "generation": Block({"samples": COUNT, "tokens": COUNT}),
        "learning_rates": list_of(RATE),
        "tuned_on": MAPPING,
        "student_from": one_of("stock", "tuned"),
        "domains": MAPPING,
        "bootstrap": FREE,
        "expected_seconds": Block(
            dict.fromkeys(("train", "measure", "rounds", *ALSO), SECONDS),
        ),
        "run": MAPPING,
        "choices": Block({"steps": COUNT, "rounds": COUNT, "runs": MAPPING}),
        "experiments": MAPPING,
    }
)
"""The keys of the configuration; those of runs are checked by `read_run`."""
EXPERIMENT = Block(
    {
        "title": TEXT,
        "question": TEXT,
        "seeds": list_of(NATURAL),
        "baseline": optional(TEXT),
        "also": list_of(one_of(*ALSO)),
        "shared": MAPPING,
        "runs": MAPPING,
    }
)


def check_config(cfg: DictConfig) -> None:
    """Check the keys and values of the configuration.

    Errors: NemoKDError that names the key, what is expected and, for a typing error, what is meant.
    """
    check(cfg, SETTINGS)
    for domain in cfg.domains:
        check(settings(cfg, domain), SETTINGS, f"domains.{domain}")
    for name, block in cfg.experiments.items():
        check(block, EXPERIMENT, f"experiments.{name}")


def settings(cfg: DictConfig, domain: str) -> DictConfig:
    """The configuration of a run's commands, with what the domain has of its own."""
    if domain not in cfg.domains:
        return cfg
    lists = ("experiments", "choices", "domains")  # to copy them would take a tenth of a second
    common = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in lists])
    return cast(DictConfig, OmegaConf.merge(common, cfg.domains[domain]))


def shaping(own: DictConfig, run: Run) -> dict[str, Any]:
    """What shapes a run's result beyond `Run`, of the settings of its domain."""
    keys = [*SHAPING, "rounds"] if run.rounds else list(SHAPING)
    block: Any = OmegaConf.to_container(OmegaConf.masked_copy(own, keys), resolve=True)
    return cast(dict[str, Any], block)


def all_steps(run: Run, own: DictConfig) -> int:
    """Training steps with the settings of the run's domain, with those of the rounds."""
    return run.steps(own.train.steps) + (run.rounds * own.rounds.steps if run.rounds else 0)


@dataclass(frozen=True)
class Run:
    """Settings of one student; `lr=None` takes the rate chosen for its family on validation."""

    domain: Annotated[str, one_of(*DOMAINS)] = "code"
    layers: Annotated[int, COUNT] = 8
    """30 is the teacher itself, which is only evaluated."""
    teacher: Annotated[str, one_of("tuned", "stock")] = "tuned"
    """`tuned` (fine-tuned on the training split) or `stock` (as released)."""
    store: str = "plain-100"
    """The teacher's logits, `<profile>-<size>`: see `assets.store_steps`."""
    answers: Annotated[str, one_of("original", "teacher", "both")] = "original"
    """`original`, `teacher` (generated by the teacher for the same prompts) or `both`."""
    tokens: Annotated[str, one_of("answer", "all")] = "answer"
    """`all`: the prompt's tokens are trained on too; held-out losses are of answers in any case."""
    alpha: Annotated[float, SHARE] = 0.5
    support: str = "bucket"
    divergence: str = "forward_kl"
    temperature: Annotated[float, RATE] = 1.0
    """If not 1: that of the store `<profile>-<size>@<temperature>`, dumped at both temperatures.
    Since the store has it, a run's name does not repeat it."""
    lr: Annotated[float | None, optional(RATE)] = None
    seed: Annotated[int, NATURAL] = 1
    """Seed of the sample order; nothing else is random."""
    length: Annotated[float, SECONDS] = 1.0
    """Steps as a fraction of the configured number; 0 evaluates the model untrained."""
    trust: Annotated[str, one_of("all", "right")] = "all"
    """`right`: samples on which the teacher's top-1 is not always the label have alpha 0."""
    rounds: Annotated[int, NATURAL] = 0
    """Rounds on the student's own answers after the training: see `examples/rounds`."""

    def __post_init__(self) -> None:
        if self.layers > TEACHER_LAYERS:
            raise NemoKDError(f"layers is {self.layers}: the teacher has {TEACHER_LAYERS}")
        store, _, of_store = self.store.partition("@")
        if of_store != (own := "" if self.temperature == 1 else f"{self.temperature:g}"):
            fitting = f"{store}@{own}" if own else store
            raise NemoKDError(
                f"temperature {self.temperature:g} does not fit store {self.store}, which was "
                f"dumped at {of_store or '1 only'}: set store={fitting}, or temperature="
                f"{of_store or 1}"
            )

    @property
    def family(self) -> str:
        """The family, whose runs share a learning rate."""
        if self.alpha == 0:
            return "sft"
        if self.alpha == 1:
            return "kd only"
        return "alpha 0.9" if self.alpha == 0.9 else self.support

    @property
    def name(self) -> str:
        """A unique and stable name, also of the run's directory."""
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
        parts += [] if self.trust == "all" else [f"trust-{self.trust}"]
        parts += [] if self.answers == "original" else [f"answers-{self.answers}"]
        parts += [] if self.tokens == "answer" else [f"tokens-{self.tokens}"]
        parts += [f"lr{self.lr:g}", f"s{self.seed}"]
        parts += [] if self.length == 1 else [f"x{self.length:g}"]
        parts += [f"rounds{self.rounds}"] if self.rounds else []
        return "-".join(parts)

    def steps(self, of: int) -> int:
        """The number of training steps if the configuration has `of`."""
        return round(of * self.length)


@dataclass(frozen=True)
class Experiment:
    """Runs that answer one question."""

    name: str
    title: str
    question: str
    runs: Mapping[str, tuple[Run, ...]]
    """Label in the report → one run per seed."""
    baseline: str | None
    """The label to compare the others with."""
    also: tuple[str, ...] = ()
    """What is measured beyond the losses, of `ALSO`."""

    def all_runs(self) -> list[Run]:
        """A seed of every label before the next seed, so that early results can be compared."""
        by_seed = itertools.zip_longest(*self.runs.values())  # labels may have fewer seeds
        return [run for runs in by_seed for run in runs if run is not None]


def read_run(base: Mapping[str, Any], overrides: Mapping[str, Any], where: str = "run") -> Run:
    """Build a run from the settings at the dotted key `where`.

    Errors: NemoKDError for a setting that `Run` does not have or does not allow.
    """
    return settings_of(Run, OmegaConf.create({**base, **overrides}), where)


def read_experiments(cfg: DictConfig) -> list[Experiment]:
    """The experiments in the order of `cfg.experiments`, which the queue follows."""
    base: Any = OmegaConf.to_container(cfg.run, resolve=True)
    content: Any = OmegaConf.to_container(cfg.experiments, resolve=True)
    read_run(base, {})  # so that a mistake in `run` is not reported of an experiment
    experiments = []
    for name, block in content.items():
        shared = {**base, **block.get("shared", {})}
        runs = {}
        for label, overrides in block["runs"].items():
            own = {key: value for key, value in overrides.items() if key != "seeds"}
            run = read_run(shared, own, f"experiments.{name}.runs.{label}")
            seeds = overrides.get("seeds", block["seeds"])
            runs[label] = tuple(dataclasses.replace(run, seed=seed) for seed in seeds)
        experiments.append(
            Experiment(
                name=name,
                title=block["title"],
                question=block["question"],
                runs=runs,
                baseline=block.get("baseline"),
                also=tuple(block.get("also", ())),
            )
        )
    return experiments


def select(experiments: list[Experiment], only: Any) -> list[Experiment]:
    """The named experiments in queue order. Errors: NemoKDError for an unknown name, or none."""
    if only is None:
        return experiments
    names = [only] if isinstance(only, str) else list(map(str, only))
    known = [experiment.name for experiment in experiments]
    if not names:
        raise NemoKDError("only=[] names no experiment: leave it out to run all")
    if unknown := [name for name in names if name not in known]:
        hint = did_you_mean(unknown[0], known) or "."
        raise NemoKDError(
            f"only: {unknown[0]} is not an experiment{hint} Known: {', '.join(known)}"
        )
    return [experiment for experiment in experiments if experiment.name in names]


def read_choices(cfg: DictConfig) -> Experiment:
    """Runs that change one setting each, at the seed used to choose the learning rates."""
    base: Any = OmegaConf.to_container(cfg.run, resolve=True)
    content: Any = OmegaConf.to_container(cfg.choices.runs, resolve=True)
    runs = {}
    for label, overrides in content.items():
        run = read_run(base, overrides, f"choices.runs.{label}")
        runs[label] = (dataclasses.replace(run, seed=cfg.tuned_on.seed),)
    return Experiment("choices", "What each choice costs", "", runs, baseline=list(runs)[1])
