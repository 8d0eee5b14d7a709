"""Metrics of each experiment's runs, read from result files; a missing value is None."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from omegaconf import DictConfig
from queue_plan import Results, resolver
from steps_ratio import Curves, Interval, difference, first_reached, ratio
from study import Experiment, Run

EXACT, DOCTESTS = "exact match", "doctests passed"
SHOTS = {shots: f"OpenBookQA, {shots}-shot" for shots in ("0", "5")}
ANSWERED = (EXACT, DOCTESTS, *SHOTS.values())
"""What is judged answer by answer, as right or wrong."""


Seeds = dict[int, dict[str, Any]]
"""Seed → result file."""
TOLERANCE = 0.02
"""Nats per token: a loss of SFT this near to its best is hardly worse, and may come far earlier."""


@dataclass(frozen=True)
class Change:
    """A difference over the seeds that both have."""

    seeds: int
    loss: Interval
    """final cross-entropy, in nats per token"""
    right: Interval | None
    """fraction of right final answers, where they are judged"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of an experiment's table: the finished runs of one label."""

    label: str
    planned: int
    """number of seeds"""
    found: tuple[dict[str, Any], ...]
    """contents of the result files of the finished seeds"""
    baseline: str | None = None
    """label of the row that this one is compared with"""
    against_baseline: Interval | None = None
    """difference in final cross-entropy, nats per token, over the seeds that both have"""
    by_seed: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """`valid` or `test` → that difference on the split, for each seed that both have; `EXACT` →
    that in the fraction of right answers"""
    steps: Interval | None = None
    """steps to reach SFT's best (same data, same depth), as a fraction of SFT's steps to it"""
    sft_best: int | None = None
    """SFT's step in that fraction"""
    nearly_best: tuple[int, float] | None = None
    """SFT's first step within `TOLERANCE` of its best, and the step here with the loss it has"""
    right_against_baseline: Mapping[str, Interval] = field(default_factory=dict)
    """one of `ANSWERED` → that difference in the fraction of right answers"""
    against_same_length: Change | None = None
    """of a shorter training with KD: the difference from SFT of the same length"""
    is_baseline: bool = False

    @property
    def seeds(self) -> Seeds:
        """The result of each finished seed."""
        return {result["run"]["seed"]: result for result in self.found}

    @property
    def compared_seeds(self) -> int:
        """The number of seeds that both this row and its baseline have."""
        return len(self.by_seed.get("test", ()))

    @property
    def untrained(self) -> bool:
        return bool(self.found) and self.found[0]["run"]["length"] == 0

    @property
    def finished(self) -> bool:
        return len(self.found) == self.planned and all(map(is_complete, self.found))

    def mean(self, metric: str, split: str = "test") -> float | None:
        """The mean of a metric over the finished seeds; losses in nats per token."""
        return mean([result[split].get(metric) for result in self.found])

    def bytes_per_token(self) -> float | None:
        """Encoded bytes per answer token of the stores trained on; None for SFT."""
        results = [r for r in self.found if r["run"]["alpha"] > 0]
        stores = [store for result in results for store in result.get("store", [])]
        tokens = sum(store["tokens"] for store in stores)
        return sum(store["bytes"] for store in stores) / tokens if tokens else None

    def share(self, what: str) -> float | None:
        """The fraction of generated answers that parse or match exactly, over all seeds.

        None if nothing was generated, or if answers of the domain are not judged by this.
        """
        judged = [result["generation"] for result in self.found if "generation" in result]
        if not judged or any(what not in each for each in judged):
            return None
        written = sum(each["samples"] for each in judged)
        return float(sum(each[what] for each in judged)) / written

    def right(self, what: str) -> float | None:
        """The fraction of right answers to one of `ANSWERED`, over all seeds."""
        answers = right_answers(self.found, what)
        return None if answers is None else float(answers.values.mean())

    def compute_hours(self) -> float | None:
        """Mean hours of training, with what the rounds' student and teacher took to generate."""
        seconds = [result["seconds"] for result in self.found]
        times = [(s["train"] + s.get("rounds", 0)) / 3600 for s in seconds if "train" in s]
        return mean(times)

    def right_by_task(self, tasks: int) -> list[float] | None:
        """The fraction of right final answers to each task, over all seeds; tasks come in turn."""
        answers = right_answers(self.found, EXACT)
        if answers is None:
            return None
        mean = answers.values.mean(axis=(0, 1))  # [questions]
        return [float(mean[task::tasks].mean()) for task in range(tasks)]


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of the known values; None if there is none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


Find = Callable[[Run], dict[str, Any] | None]


def finder(cfg: DictConfig, results: Results) -> Find:
    """A function that returns the contents of a run's result file.

    None before the run is finished or has a learning rate.
    """
    resolve = resolver(cfg, results)

    def find(run: Run) -> dict[str, Any] | None:
        resolved = resolve(run)
        return None if resolved is None else results.get(resolved.name)

    return find


def rows(cfg: DictConfig, experiment: Experiment, find: Find) -> list[Row]:
    """One row per label, in the experiment's order."""
    found = {
        label: {run.seed: result for run in runs if (result := find(run)) is not None}
        for label, runs in experiment.runs.items()
    }
    compared_with = experiment.runs.get(experiment.baseline or "", (Run(),))[0]
    table = []
    for label, runs in experiment.runs.items():
        mine = found[label]
        baseline = experiment.compared_with(label)
        against = found.get(baseline or "", {})
        sft = sft_beside(find, runs, compared_with.tokens)
        shorter = [run for run in runs if 0 < run.length < Run.length]
        same_length = sft_beside(find, shorter, compared_with.tokens, complete=False)
        table.append(
            Row(
                label=label,
                planned=1 if runs[0].length == 0 else len(runs),  # an untrained model has no seeds
                found=tuple({result["name"]: result for result in mine.values()}.values()),
                baseline=baseline,
                against_baseline=compared(cfg, difference, against, mine),
                by_seed=by_seed(against, mine),
                steps=compared(cfg, ratio, sft, mine),
                sft_best=best_step(sft, mine),
                nearly_best=nearly_best(sft, mine),
                right_against_baseline=right_differences(cfg, against, mine),
                against_same_length=change(cfg, same_length, mine),
                is_baseline=label == experiment.baseline,
            )
        )
    return table


def sft_beside(find: Find, runs: Sequence[Run], tokens: str, *, complete: bool = True) -> Seeds:
    """SFT runs of the same domain, depth and seeds, on `tokens`; empty for SFT itself.

    Beside a shorter run it is the complete SFT, if `complete`, beside a longer one SFT of the same
    length.
    """
    found: Seeds = {}
    for run in runs:
        same = {"domain": run.domain, "layers": run.layers, "seed": run.seed}
        length = max(Run.length, run.length) if complete else run.length
        sft = Run(**same, alpha=0, tokens=tokens, length=length)
        is_sft = run.alpha == 0 and (run.answers, run.tokens) == (sft.answers, sft.tokens)
        result = None if is_sft else find(sft)
        if result is not None:
            found[run.seed] = result
    return found


def compared(
    cfg: DictConfig,
    how: Callable[..., Interval],
    a: Seeds,
    b: Seeds,
    read: Callable[[Sequence[dict[str, Any]]], Curves | None] | None = None,
) -> Interval | None:
    """Compare what `read` (`curves`) finds over the common seeds that have it; None without any."""
    pair = common(a, b, read or curves)
    return None if pair is None else how(*pair, **cfg.bootstrap)


def common(
    a: Seeds, b: Seeds, read: Callable[[Sequence[dict[str, Any]]], Curves | None]
) -> tuple[Curves, Curves] | None:
    """What `read` finds of both, over the seeds that have it in both; None without any."""
    both = [seed for seed in b if seed in a and read([a[seed]]) and read([b[seed]])]
    first, second = read([a[seed] for seed in both]), read([b[seed] for seed in both])
    return None if first is None or second is None else (first, second)


def by_seed(a: Seeds, b: Seeds) -> dict[str, tuple[float, ...]]:
    """B's figures minus A's, for each seed that both have: see `Row.by_seed`."""
    both = [seed for seed in b if seed in a]
    found = {
        split: tuple(b[s][split]["sft_loss"] - a[s][split]["sft_loss"] for s in both)
        for split in ("valid", "test")
    }
    shares = [[right_answers([each[s]], EXACT) for each in (a, b)] for s in both]
    if shares and all(one and other for one, other in shares):
        found[EXACT] = tuple(float(y.values.mean() - x.values.mean()) for x, y in shares)
    return found


def best_step(a: Seeds, b: Seeds) -> int | None:
    """The step of A's best over the seeds that both have, as in their ratio; None without any."""
    pair = common(a, b, curves)
    return None if pair is None else int(pair[0].steps[pair[0].best])


def nearly_best(a: Seeds, b: Seeds) -> tuple[int, float] | None:
    """A's first step within `TOLERANCE` of its best, and the step at which B has that loss.

    Over the seeds that both have, None without any; B's step is inf where it never has that loss.
    """
    pair = common(a, b, curves)
    if pair is None:
        return None
    first, second = pair
    losses = first.mean()
    early = int(np.flatnonzero(losses <= losses.min() + TOLERANCE)[0])
    step = first_reached(second.steps, second.mean(), losses[early])
    return int(first.steps[early]), float(step)


def difference_at(cfg: DictConfig, a: Row, b: Row, step: int) -> Interval | None:
    """B's loss minus A's at a step of their curves; None if both have no curve with it."""
    pair = common(a.seeds, b.seeds, curves)
    if pair is None or any(step not in curve.steps for curve in pair):
        return None
    return difference(*pair, **cfg.bootstrap, step=step)


def change(cfg: DictConfig, a: Seeds, b: Seeds) -> Change | None:
    """B minus A; None without a seed that both have."""
    loss = compared(cfg, difference, a, b)
    if loss is None:
        return None
    return Change(len(a.keys() & b.keys()), loss, right_differences(cfg, a, b).get(EXACT))


def right_differences(cfg: DictConfig, a: Seeds, b: Seeds) -> dict[str, Interval]:
    """The entries of `ANSWERED` that both have → difference in the fraction of right answers."""
    found = {
        what: compared(cfg, difference, a, b, partial(right_answers, what=what))
        for what in ANSWERED
    }
    return {what: each for what, each in found.items() if each is not None}


def curves(found: Sequence[dict[str, Any]]) -> Curves | None:
    """The cross-entropy curves of runs of equal length; None without any or if one is cut short."""
    if not found or any("curve" not in result for result in found):
        return None
    if not all(is_complete(result) for result in found):
        return None
    first = found[0]["curve"]
    return Curves(
        np.array(first["steps"], dtype=float),
        np.array([result["curve"]["sft_loss"] for result in found]),
        np.array(list(first["groups"].values()), dtype=float),
    )


def is_complete(result: Mapping[str, Any]) -> bool:
    """Whether a trained run's curve goes to its last step, without which it is not compared."""
    return "curve" not in result or result["curve"]["steps"][-1] == result["steps"]


def right_answers(found: Sequence[dict[str, Any]], what: str) -> Curves | None:
    """Which answers are right, as curves of one point with a group for each question.

    None if there are none, or if they are not judged one by one.
    """
    right = [answers(result).get(what) for result in found]
    if not right or None in right:
        return None
    values = np.array([[int(each) for each in seed or ""] for seed in right], dtype=float)
    values = values[:, None, :]  # [seeds, 1, questions]
    return Curves(np.zeros(1), values, np.ones(values.shape[-1]))


def answers(result: Mapping[str, Any]) -> dict[str, str]:
    """The entries of `ANSWERED` in a result file, each a string of 1 (right) and 0 per question."""
    found = {EXACT: result.get("generation", {}).get("right")}
    found[DOCTESTS] = result.get("doctests", {}).get("right")
    known = result.get("knowledge", {}).get("right", {})
    found |= {SHOTS[shots]: known.get(shots) for shots in SHOTS}
    return {what: right for what, right in found.items() if right is not None}


@dataclass(frozen=True)
class ConfidenceClass:
    """Answer tokens to whose labels the teacher gives a probability in [low, high)."""

    low: float
    high: float
    share: float
    """fraction of all answer tokens"""
    seeds: int
    """over which the losses are means"""
    a: float
    """cross-entropy of the class, in nats per token of the class"""
    b: float

    @property
    def part(self) -> float:
        """The part of B's difference from A, in nats per answer token of any class."""
        return self.share * (self.b - self.a)


def confidence_classes(a: Row, b: Row) -> list[ConfidenceClass]:
    """By the teacher's probability of the label, over the seeds that both have; empty without any.

    Classes without a token are left out.
    """
    first, second = ({s: r for s, r in x.seeds.items() if "confidence" in r} for x in (a, b))
    both = [seed for seed in first if seed in second]
    if not both:
        return []
    split = first[both[0]]["confidence"]
    ends = [*split["from"][1:], 1.0]
    found = []
    for i, (low, high) in enumerate(zip(split["from"], ends, strict=True)):
        if tokens := split["tokens"][i]:
            losses = [
                statistics.fmean(of[seed]["confidence"]["sft_loss"][i] for seed in both)
                for of in (first, second)
            ]
            share = tokens / sum(split["tokens"])
            found.append(ConfidenceClass(low, high, share, len(both), *losses))
    return found


def seed_spreads(rows: Iterable[Row], measure: str = "test") -> dict[str, float]:
    """Domain → the standard deviation from seed to seed of a difference from the baseline.

    `measure`: a key of `Row.by_seed`, in nats per token or, of `EXACT`, a fraction. Pooled over the
    distinct comparisons of trained runs; without a domain that has none of several seeds.
    """
    differences: dict[str, set[tuple[float, ...]]] = {}
    for row in rows:
        if len(row.found) > 1 and len(row.by_seed.get(measure, ())) > 1:
            domain = row.found[0]["run"]["domain"]
            differences.setdefault(domain, set()).add(row.by_seed[measure])
    return {
        domain: math.sqrt(statistics.fmean(map(statistics.variance, found)))
        for domain, found in differences.items()
    }


Spreads = Mapping[str, Mapping[str, float]]
"""A key of `Row.by_seed` → `seed_spreads`"""


def spreads_of(rows: Sequence[Row]) -> Spreads:
    """`seed_spreads` of every measure."""
    return {measure: seed_spreads(rows, measure) for measure in ("valid", "test", EXACT)}


def verdict(row: Row, spreads: Spreads | None = None) -> str | None:
    """`better`, `worse` or `undecided`, by the interval of the difference from the baseline.

    The difference is that of right final answers where they are judged, else of cross-entropy. The
    interval of a single seed does not cover what another order of the data changes: then a
    difference below two standard deviations from seed to seed (`spreads`) is undecided too.
    """
    right = row.right_against_baseline.get(EXACT)
    found = row.against_baseline
    if right is not None:
        found = Interval(-right.value, -right.high, -right.low)
    if found is None:
        return None
    if row.compared_seeds == 1:
        measure = "test" if right is None else EXACT
        domain = row.found[0]["run"]["domain"]
        if abs(found.value) < 2 * (spreads or {}).get(measure, {}).get(domain, 0.0):
            return "undecided"
    if found.high < 0:
        return "better"
    return "worse" if found.low > 0 else "undecided"


def in_both(*rows: Row) -> tuple[Row, ...]:
    """The rows with only the seeds that all of them have."""
    seeds = set.intersection(*(set(row.seeds) for row in rows))
    return tuple(
        replace(row, found=tuple(result for seed, result in row.seeds.items() if seed in seeds))
        for row in rows
    )
