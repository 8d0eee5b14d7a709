"""The remaining runs in queue order, and how long they will take.

A job is one run up to its result file, with what is measured beyond the losses. A run that
waits for its family's learning rate is preceded by the runs that decide it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from steps import claim
from study import Experiment, Run, all_steps, read_run, settings, shaping

from nemo_kd.errors import NemoKDError
from nemo_kd.store.spec import leaves

Results = Mapping[str, dict[str, Any]]
"""Run name → contents of its result file."""
STEPS = "train.steps × length"
FAMILY_OBJECTIVES: dict[str, dict[str, Any]] = {
    "sft": {"alpha": 0},
    "bucket": {},
    "vocab": {"support": "vocab"},
    "topk": {"support": "topk"},
    "kd only": {"alpha": 1},
    "alpha 0.9": {"alpha": 0.9},
}


@dataclass(frozen=True)
class Job:
    """A run with its learning rate."""

    run: Run
    also: tuple[str, ...] = ()
    """Entries of the result file, for which the model generates or is asked."""
    decided: bool = True
    """False until the learning rate is chosen; until then the run has the first of the grid."""

    def is_done(self, results: Results) -> bool:
        found = results.get(self.run.name)
        return found is not None and all(each in found for each in self.also)

    def covers(self, other: Job) -> bool:
        """Whether the other job is a part of this one."""
        same = (self.run.name, self.decided) == (other.run.name, other.decided)
        return same and set(self.also) >= set(other.also)


def read_results(directory: Path) -> dict[str, dict[str, Any]]:
    """Read every result file of a directory, which need not exist."""
    paths = sorted(directory.glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def check_results(cfg: DictConfig, results: Results) -> None:
    """Check that the results were made with the present configuration.

    A run's name holds only the settings of `Run`; files written since have the others, too, as
    `settings`. Of older files only the number of training steps is known.

    Errors: NemoKDError that names the first file, the setting and both values.
    """
    own: dict[str, DictConfig] = {}
    for name, content in results.items():
        run = recorded_run(content)
        if run.domain not in own:
            own[run.domain] = settings(cfg, run.domain)
        now = shaping(own[run.domain], run)
        then = content.get("settings", now)
        steps = all_steps(run, own[run.domain])
        now, then = now | {STEPS: steps}, then | {STEPS: content.get("steps", steps)}
        if change := _change(dict(leaves("", then)), dict(leaves("", now))):
            raise NemoKDError(
                f"{name}.json is a result {change}: give another results= and another out= for the "
                "new setting, or the old setting"
            )


def recorded_run(content: Mapping[str, Any]) -> Run:
    """The run of a result file; settings that earlier versions had besides are left out."""
    known = {field.name for field in dataclasses.fields(Run)}
    return Run(**{key: value for key, value in content["run"].items() if key in known})


def _change(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first setting that differs, with both values; "" if none does."""
    for key in (*now, *then):
        if (old := then.get(key)) != (new := now.get(key)):
            return f"with {key}={old}, and the configuration has {key}={new}"
    return ""


def grid(cfg: DictConfig, family: str, results: Results, domain: str = "code") -> list[Run]:
    """The runs that decide a family's learning rate, in ascending order of the rate.

    The configured rates, extended by factors of two while the best measured one is at an end.
    """
    cfg = settings(cfg, domain)
    base: Any = OmegaConf.to_container(cfg.run, resolve=True)
    tuned_on: Any = OmegaConf.to_container(cfg.tuned_on, resolve=True)
    run = read_run(base, {**tuned_on, **FAMILY_OBJECTIVES[family]}, "tuned_on")

    def at(rate: float) -> Run:
        return dataclasses.replace(run, lr=float(f"{rate:g}"))

    rates = list(cfg.learning_rates)
    while all(at(rate).name in results for rate in rates):
        losses = [_valid(at(rate), results) for rate in rates]
        if losses[0] < min(losses[1:]):
            rates.insert(0, rates[0] / 2)
        elif losses[-1] < min(losses[:-1]):
            rates.append(rates[-1] * 2)
        else:
            break
    return [at(rate) for rate in rates]


def _valid(run: Run, results: Results) -> float:
    """Cross-entropy on the validation split, nats per token."""
    return float(results[run.name]["valid"]["sft_loss"])


def chosen_lr(cfg: DictConfig, family: str, results: Results, domain: str = "code") -> float | None:
    """The rate with the lowest validation cross-entropy; None until its grid is measured."""
    runs = grid(cfg, family, results, domain)
    if any(run.name not in results for run in runs):
        return None
    return min(runs, key=lambda run: _valid(run, results)).lr


Resolve = Callable[[Run], Run | None]


def resolver(cfg: DictConfig, results: Results) -> Resolve:
    """A function that returns a run with its learning rate; None until that is chosen.

    Each family's rate is looked up once.
    """
    rate_of = functools.cache(lambda family, domain: chosen_lr(cfg, family, results, domain))

    def resolve(run: Run) -> Run | None:
        if run.lr is not None or run.length == 0:
            return run
        rate = rate_of(run.family, run.domain)
        return None if rate is None else dataclasses.replace(run, lr=rate)

    return resolve


def remaining(cfg: DictConfig, experiments: Sequence[Experiment], results: Results) -> list[Job]:
    """The jobs that are not done, each once; a run comes after those that decide its learning rate.

    Until then its job is marked as undecided.
    """
    jobs: list[Job] = []
    resolve = resolver(cfg, results)
    for experiment in experiments:
        for job in _jobs(cfg, experiment, results, resolve):
            done = job.decided and job.is_done(results)
            if not done and not any(each.covers(job) for each in jobs):
                jobs.append(job)
    return jobs


def _jobs(
    cfg: DictConfig, experiment: Experiment, results: Results, resolve: Resolve
) -> Iterator[Job]:
    for run in experiment.all_runs():
        resolved = resolve(run)
        if resolved is None:
            rates = grid(cfg, run.family, results, run.domain)
            yield from (Job(rate) for rate in rates)
            waiting = dataclasses.replace(run, lr=rates[0].lr)
            yield Job(waiting, experiment.also, decided=False)
        else:
            yield Job(resolved, experiment.also)


def first_free(jobs: list[Job], *places: Path) -> tuple[Job, ExitStack] | None:
    """Claim the first job that no other queue with one of these places has, until it is closed."""
    for job in jobs:
        with ExitStack() as claimed:
            try:
                for place in places:
                    claimed.enter_context(claim(place / f"run-{job.run.name}", wait=False))
            except BlockingIOError:
                continue
            return job, claimed.pop_all()
    return None


def estimate(cfg: DictConfig, job: Job, results: Results) -> float:
    """Estimated seconds of a job: the median of finished runs of the same depth, if any."""
    expected = cfg.expected_seconds
    depth = 1.0 if job.run.layers <= 8 else job.run.layers / 8
    like = [r for r in results.values() if r["run"]["layers"] == job.run.layers]

    def median(part: str, fallback: float, scale: str = "") -> float:
        times = [
            r["seconds"][part] / (r["run"][scale] if scale else 1)
            for r in like
            if part in r["seconds"]
        ]
        return statistics.median(times) if times else fallback

    seconds = 0.0
    if job.run.name not in results:
        seconds += median("measure", expected.measure * depth)
        if job.run.length > 0:
            seconds += job.run.length * median("train", expected.train * depth, "length")
        seconds += job.run.rounds * median("rounds", expected.rounds * depth, "rounds")
    return seconds + sum(median(each, expected[each] * depth) for each in job.also)
