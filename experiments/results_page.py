"""`docs/results.md`: every figure from result files, what is missing named as not run yet."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import results_words as words
from findings import Row
from omegaconf import DictConfig
from queue_plan import Results, chosen_lr
from study import Experiment, Run

NOT_RUN = "not run yet"
PUBLISHED_SHARE, BEYOND_SHARE = 0.70, 0.50  # of SFT's steps: as published, and beyond it


@dataclass(frozen=True)
class Study:
    """Everything the page shows."""

    cfg: DictConfig
    experiments: Sequence[Experiment]
    rows: Mapping[str, list[Row]]
    """Experiment → its table."""
    results: Results
    data: Mapping[str, dict[str, Any]]
    """Domain → data.json."""
    choices: Sequence[Row]
    """One setting at a time."""
    timed: Mapping[str, Any] | None
    """What `time_steps.py` measured."""


def page(study: Study, figures: Mapping[str, str]) -> str:
    """The whole page; `figures` has the path of each experiment's picture."""
    parts = [
        "# Results\n",
        "This page is written by `python experiments/write_report.py` from the files of "
        "`experiments/results`, and by nobody's hand. `make experiments` makes them.\n",
        words.how_much(study.experiments, study.rows, study.results),
        "## KD + SFT against SFT\n",
        words.headline(study.rows["headline"], PUBLISHED_SHARE, BEYOND_SHARE),
        published_table(study),
        picture(figures, "headline"),
        "## What helped, what did not\n",
        words.verdicts(study.experiments, study.rows),
        "## Recommended settings\n",
        words.recommendation(
            [
                *study.rows["default_profile"],
                *study.choices[1:],
                *study.rows["default_alpha"],
                *study.rows["alpha"],
            ]
        ),
        "## The setting\n",
        setting(study),
        "## What each choice costs\n",
        choices(study),
        *(part for e in study.experiments for part in section(study, e, figures)),
        "## What it took\n",
        table(
            ["", "finished runs of its own", "hours"],
            words.costs(study.rows, study.experiments, study.results),
        ),
        "Training, measuring and writing, one command at a time with "
        f"{study.cfg.threads} thread on a machine with other work: upper bounds of core-hours.\n",
    ]
    return "\n".join(part for part in parts if part)


def published_table(study: Study) -> str:
    """One line a method, one column a benchmark, as such results are published."""
    teachers = [row for row in study.rows["reference"] if row.label.startswith("Teacher")]
    code = {row.label: row for row in (*teachers, *study.rows["headline"])}
    default = next(row for row in study.rows["default_alpha"] if row.is_baseline)
    code[f"KD + SFT, {default.label}"] = default
    prose = {row.label: row for row in study.rows["prose"]}
    head = ["", *(f"code: {name}" for name in CODE_BENCHMARKS)]
    head += [f"prose: {name}" for name in PROSE_BENCHMARKS]
    lines = []
    for label in code:
        cells = [benchmark(code[label], how) for how in CODE_BENCHMARKS.values()]
        cells += [benchmark(prose.get(label), how) for how in PROSE_BENCHMARKS.values()]
        lines.append([label, *cells])
    seeds = [
        f"{label} {len(row.found)} of {row.planned}"
        for label, row in code.items()
        if row not in teachers
    ]
    written = sorted({row.written for row in code.values()} - {0}) or [1]
    note = (
        f"Means over the finished seeds (code: {'; '.join(seeds)}), on held-out modules. "
        "Cross-entropy and calibration error: lower is better; the others: higher. Shares of "
        f"functions are of {' or '.join(map(str, written))}: one standard error is up to "
        f"{50 / written[0] ** 0.5:.0f} points.\n"
    )
    return table(head, lines) + "\n" + note


def benchmark(row: Row | None, how: tuple[str, str]) -> str:
    kind, metric = how
    if row is None:
        return NOT_RUN
    value = row.share(metric) if kind == "share" else row.mean(metric)
    return NOT_RUN if value is None else number(value, kind)


def number(value: float, kind: str) -> str:
    return f"{value:.3f}" if kind == "loss" else f"{100 * value:.1f} %"


CODE_BENCHMARKS = {
    "cross-entropy": ("loss", "sft_loss"),
    "top-1 is the label": ("part", "top1_label"),
    "calibration error": ("loss", "calibration_error"),
    "function parses": ("share", "parses"),
    "exact match": ("share", "exact"),
}
PROSE_BENCHMARKS = {
    "cross-entropy": ("loss", "sft_loss"),
    "top-1 is the label": ("part", "top1_label"),
}


def section(study: Study, experiment: Experiment, figures: Mapping[str, str]) -> list[str]:
    """Question, table, picture of one experiment."""
    rows = study.rows[experiment.name]
    parts = [f"## {experiment.title}\n", f"{experiment.question}\n", experiment_table(rows)]
    if experiment.name == "learning_rate":
        parts.append(words.learning_rates(study.cfg, study.results))
    if experiment.name not in ("headline", "learning_rate"):
        parts.append(picture(figures, experiment.name))
    return parts


def experiment_table(rows: Sequence[Row]) -> str:
    """A line a label; the baseline has no difference."""
    head = [
        "",
        "seeds",
        "cross-entropy",
        "less baseline's",
        "on validation",
        "KL to the teacher",
        "top-1 is the label",
        "calibration error",
        "steps ratio",
        "bytes a token",
    ]
    lines = []
    for row in rows:
        name = f"**{row.label}** (baseline)" if row.is_baseline else row.label
        if not row.found:
            lines.append([name, f"0 of {row.planned}", NOT_RUN, *[""] * (len(head) - 3)])
            continue
        lines.append(
            [
                name,
                f"{len(row.found)} of {row.planned}",
                words.figure(row.mean("sft_loss")),
                words.interval(row.against_baseline, signed=True),
                words.figure(row.mean("sft_loss", "valid")),
                words.figure(row.mean("kd_loss")),
                words.figure(row.mean("top1_label"), percent=True),
                words.figure(row.mean("calibration_error")),
                words.interval(row.steps),
                words.figure(row.bytes_per_token(), digits=0),
            ]
        )
    return table(head, lines)


def choices(study: Study) -> str:
    """Bytes, seconds and quality, one setting at a time."""
    times: dict[str, list[float]] = {} if study.timed is None else study.timed["seconds"]
    base = next(row.label for row in study.choices if row.is_baseline)
    head = ["", "bytes a token", "s a step", "of SFT's", "cross-entropy", f"less {base}'s"]
    lines = []
    for row in study.choices:
        mine, sft = times.get(row.label), times.get(study.choices[0].label)
        seconds, share = NOT_RUN, ""
        if mine and sft:
            seconds = words.figure(statistics.median(mine), digits=2)
            shares = [time / sft_time for time, sft_time in zip(mine, sft, strict=True)]
            share = f"{statistics.median(shares):.2f} [{min(shares):.2f}, {max(shares):.2f}]"
        loss = words.figure(row.mean("sft_loss")) or NOT_RUN
        against = words.interval(row.against_baseline, signed=True)
        size = words.figure(row.bytes_per_token(), digits=0)
        lines.append([row.label, size, seconds, share, loss, against])
    note = (
        f"{base}: forward KL over `bucket`, K = {study.cfg.teacher.top_k}, profile `plain`, alpha "
        f"{Run.alpha:g}; below it one setting changed at a time. One seed."
    )
    if study.timed is not None:
        steps, rounds = study.timed["steps"], len(times[study.choices[0].label])
        note += (
            f" Seconds: medians of {steps} steps, then of {rounds} rounds side by side with "
            f"{words.plural(study.timed['threads'], 'thread')}; in brackets the least and the "
            "greatest share of a round."
        )
    return table(head, lines) + "\n" + note + "\n"


def setting(study: Study) -> str:
    """Data, models, training, measures."""
    cfg, lines = study.cfg, []
    for domain, about in study.data.items():
        splits = ", ".join(
            f"{about[split]['samples']} {name} samples of {about[split]['modules']} modules"
            for split, name in (("train", "training"), ("valid", "validation"), ("test", "test"))
        )
        sources = ", ".join(
            f"{s['package']} {s['version']} ({s['licence']})" for s in about["sources"]
        )
        lines.append([f"data, {domain}", f"{splits}; no module in two splits. From {sources}"])
    lines += [[key, value] for key, value in words.setting(cfg).items()]
    lines += [
        [f"learning rate, {family}", NOT_RUN if rate is None else f"{rate:g}"]
        for family in ("sft", "bucket", "vocab", "topk", "alone")
        for rate in [chosen_lr(cfg, family, study.results)]
    ]
    return table(["", ""], lines)


def picture(figures: Mapping[str, str], name: str) -> str:
    return f"![{name}]({figures[name]})\n" if name in figures else ""


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    rule = ["---", *["---:"] * (len(head) - 1)] if head[0] == "" and any(head) else ["---"] * 2
    rows = ["| " + " | ".join(cells) + " |" for cells in (head, rule, *lines)]
    return "\n".join(rows) + "\n"
