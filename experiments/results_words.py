"""The page's sentences. Each says what the figures say, whichever way they went."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from findings import Row, verdict
from omegaconf import DictConfig
from queue_plan import Results, chosen_lr, grid
from steps_ratio import Interval
from study import Experiment, Run

from nemo_kd.loss import KDConfig
from nemo_kd.teacher.config import TopKConfig

Rows = Mapping[str, list[Row]]


def figure(value: float | None, *, percent: bool = False, digits: int = 3) -> str:
    if value is None:
        return ""
    return f"{100 * value:.1f} %" if percent else f"{value:.{digits}f}"


def interval(found: Interval | None, *, signed: bool = False) -> str:
    """`0.68 [0.61, 0.74]`; a limit that is never reached is `never`."""
    if found is None:
        return ""

    def one(value: float) -> str:
        if math.isinf(value):
            return "never"
        return f"{value:+.3f}" if signed else f"{value:.2f}"

    return f"{one(found.value)} [{one(found.low)}, {one(found.high)}]"


def how_much(experiments: Sequence[Experiment], rows: Rows, results: Results) -> str:
    """How much of the list is finished."""
    names = [e.title for e in experiments if all(row.finished for row in rows[e.name])]
    open_ = [e.title for e in experiments if not all(row.finished for row in rows[e.name])]
    text = f"{len(names)} of {len(experiments)} experiments are finished, {len(results)} runs."
    if open_:
        text += f" Not, or not wholly, run yet: {'; '.join(open_)}."
    return text + "\n"


def headline(rows: Sequence[Row], published: float, beyond: float) -> str:
    """The claim, confirmed or not."""
    sft, kd = rows[0], rows[1]
    gain, steps = kd.against_baseline, kd.steps
    if gain is None or steps is None:
        return "Not run yet.\n"
    seeds = min(len(sft.found), len(kd.found))
    less = {"better": "lower", "worse": "higher", "undecided": "not surely different:"}
    text = (
        f"After the same steps on the same data in the same order ({plural(seeds, 'seed')} of "
        f"{sft.planned}), the held-out cross-entropy of KD + SFT is "
        f"{less[verdict(kd) or 'undecided']} by {abs(gain.value):.3f} nats a token "
        f"(difference {interval(gain, signed=True)}). "
    )
    if math.isinf(steps.value):
        text += "KD + SFT never is as good as SFT's best. "
    else:
        text += f"It is as good as SFT's best after {steps.value:.2f} of its steps "
        text += f"({interval(steps)}). "
    text += f"Published: {published:.2f}; here that is {reached(steps, published)}, "
    text += f"and {beyond:.2f} {reached(steps, beyond)}."
    return text + "\n"


def reached(steps: Interval, target: float) -> str:
    if steps.high <= target:
        return "reached, with the whole interval"
    if steps.value <= target:
        return "reached, but not with the whole interval"
    return "not reached"


def verdicts(experiments: Sequence[Experiment], rows: Rows) -> str:
    """Every comparison of the list under one of three headings, those that failed too."""
    groups: dict[str, list[str]] = {"better": [], "worse": [], "undecided": []}
    said: set[tuple[str, ...]] = set()  # experiments share runs, and so comparisons
    for experiment in experiments:
        base = [row for row in rows[experiment.name] if row.is_baseline]
        for row in rows[experiment.name]:
            outcome = verdict(row)
            names = tuple(result["name"] for each in (*base, row) for result in each.found)
            if outcome is not None and names not in said:
                said.add(names)
                seeds = plural(len(row.found), "seed")
                groups[outcome].append(
                    f"- {experiment.title}: {row.label}, "
                    f"{interval(row.against_baseline, signed=True)} against "
                    f"{experiment.baseline} ({seeds})"
                )
    titles = {
        "better": "Better than its baseline: the whole interval is below 0",
        "worse": "Worse than its baseline: the whole interval is above 0",
        "undecided": "Undecided: the interval has 0 inside",
    }
    parts = [
        f"**{title}**\n\n" + ("\n".join(groups[key]) or "Nothing so far.") + "\n"
        for key, title in titles.items()
    ]
    parts.append(
        "Differences are of the final held-out cross-entropy, in nats a token. One seed says "
        "nothing of how another order of the data would end: its interval is that of the test "
        "data alone.\n"
    )
    return "\n".join(parts)


def recommendation(beside: Sequence[Row]) -> str:
    """The product's defaults, and what was measured beside them; the first of a label counts."""
    loss, store = KDConfig(), TopKConfig()
    defaults = {
        "model.kd.alpha": f"{loss.weights[1]:g}",
        "model.kd.support": loss.support,
        "model.kd.divergence": loss.divergence,
        "model.kd.temperature": f"{loss.temperature:g}",
        "dump.top_k": str(store.top_k),
        "dump.profile": store.profile,
    }
    text = "The recommended settings are the defaults: "
    text += ", ".join(f"`{key}={value}`" for key, value in defaults.items()) + ". "
    text += "The learning rate wants a search of its own: KD + SFT's is not SFT's. "
    text += (
        "All but the learning rate was chosen by the test split itself: where the tables' column "
    )
    text += "of the validation split, which is smaller and chose none of it, says otherwise, the "
    text += "choice is not sure."
    found: dict[str, dict[str, str]] = {"better": {}, "worse": {}, "undecided": {}}
    for row in {row.label: row for row in reversed(beside)}.values():
        if (outcome := verdict(row)) is not None:
            difference = interval(row.against_baseline, signed=True)
            found[outcome][row.label] = f"{difference}, {plural(len(row.found), 'seed')}"
    said = {
        outcome: "; ".join(f"{label} ({how})" for label, how in reversed(labels.items()))
        or "nothing that was run"
        for outcome, labels in found.items()
    }
    return (
        f"{text}\n\nOne setting changed at a time, held-out cross-entropy on code, nats a token. "
        f"Better: {said['better']}. Not surely different: {said['undecided']}. Worse: "
        f"{said['worse']}.\n"
    )


def learning_rates(cfg: DictConfig, results: Results) -> str:
    """What was chosen, of what."""
    lines = []
    for family in ("sft", "bucket", "vocab", "topk", "alone"):
        rate = chosen_lr(cfg, family, results)
        if rate is None:
            continue
        losses = [
            f"{results[r.name]['valid']['sft_loss']:.3f} at {r.lr:g}"
            for r in grid(cfg, family, results)
        ]
        lines.append(f"- {family}: {rate:g}, by the validation split ({', '.join(losses)})")
    return "\n".join(lines) + "\n" if lines else ""


def setting(cfg: DictConfig) -> dict[str, str]:
    """Name and value of what a reader needs to judge the figures."""
    train, boot = cfg.train, cfg.bootstrap
    epochs = train.steps * train.batch / cfg.data.train
    return {
        "teacher": "SmolLM2-135M-Instruct (30 layers), fine-tuned on the training split for "
        f"{cfg.teacher.steps} steps at learning rate {cfg.teacher.lr:g}",
        "students": "the teacher as it comes, pruned to the layers of most block influence",
        "objective": f"alpha {Run.alpha:g}, forward KL, support `bucket`, profile `plain`, where a "
        "line does not say otherwise",
        "training": f"{train.steps} steps of {train.batch} samples, {epochs:g} times over the "
        f"training split; {train.precision}, cosine decay to 0 after {train.warmup} steps",
        "seed": "the order of the samples, in every epoch the same for all objectives of a seed; "
        "students start from the same weights and have no dropout, nothing else is random",
        "learning rate": "of each family of objectives, chosen on the validation split with seed "
        f"{cfg.tuned_on.seed} of 8 layers on code, used everywhere; the grid begins with "
        f"{' and '.join(f'{rate:g}' for rate in cfg.learning_rates)} and is doubled or halved "
        "until its best is not at an end",
        "held-out figures": "over the answer tokens of the test split, where no other is named, "
        f"every {train.validate_every} steps; the KL is to the fine-tuned teacher's top "
        f"{cfg.teacher.top_k} and the rest in one bucket",
        "intervals": f"{100 * boot.level:g} %, percentiles of {boot.draws} draws of the test "
        f"split's {cfg.data.groups} groups of modules and of the seeds",
        "steps ratio": "the step at which the curve first is as low as the lowest of SFT on the "
        "same data with the same depth, as a share of SFT's step; never: it is not within the run",
    }


def costs(rows: Rows, experiments: Sequence[Experiment], results: Results) -> list[list[str]]:
    """A line an experiment: its runs, and the hours of those that are finished. Runs that an
    earlier experiment has too are counted there; those of no table chose learning rates."""
    left = dict(results)
    groups = []
    for experiment in experiments:
        names = {r["name"] for row in rows[experiment.name] for r in row.found}
        groups.append((experiment.title, [left.pop(name) for name in names & left.keys()]))
    groups += [("Further learning rates", [*left.values()]), ("All", [*results.values()])]
    return [[title, str(len(found)), _hours(found)] for title, found in groups]


def _hours(found: Sequence[Mapping[str, Any]]) -> str:
    """Of whole commands: the time of a step is part of one."""
    seconds = [time for r in found for key, time in r["seconds"].items() if key != "step"]
    return f"{sum(seconds) / 3600:.2f}" if found else ""


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
