"""`docs/results.md`: every figure from result files, what is missing named as not run yet."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import results_words as words
from findings import Row, compared, result_of
from omegaconf import DictConfig
from queue_plan import Results, chosen_lr
from steps_ratio import difference
from study import Experiment, timed_runs

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
    timed: Mapping[str, Any] | None
    """What `time_steps.py` measured."""


def page(study: Study, figures: Mapping[str, str]) -> str:
    """The whole page; `figures` has the path of each experiment's picture."""
    parts = [
        "# Results\n",
        "This page is written by `python experiments/write_report.py` from the files of "
        "`experiments/results`, and by nobody's hand. `make experiments` makes them.\n",
        words.how_much(study.experiments, study.rows),
        "## KD + SFT against SFT\n",
        words.headline(study.rows["headline"], PUBLISHED_SHARE, BEYOND_SHARE),
        published_table(study),
        picture(figures, "headline"),
        "## What helped, what did not\n",
        words.verdicts(study.experiments, study.rows),
        "## Recommended settings\n",
        words.recommendation(study.rows),
        "## The setting\n",
        setting(study),
        "## What each choice costs\n",
        choices(study),
        *(section(study, experiment, figures) for experiment in study.experiments),
        "## What it took\n",
        table(
            ["", "finished runs of its own", "hours"], words.costs(study.rows, study.experiments)
        ),
        "Training, measuring and writing, one command at a time with "
        f"{study.cfg.threads} thread on a machine with other work: upper bounds of core-hours.\n",
    ]
    return "\n".join(part for part in parts if part)


def published_table(study: Study) -> str:
    """One line a method, one column a benchmark, as such results are published."""
    teachers = [row for row in study.rows["reference"] if row.label.startswith("Teacher")]
    code = {row.label: row for row in (*teachers, *study.rows["headline"])}
    prose = {row.label: row for row in study.rows["prose"]}
    head = ["", *(f"code: {name}" for name in CODE_BENCHMARKS)]
    head += [f"prose: {name}" for name in PROSE_BENCHMARKS]
    lines = []
    for label in code:
        cells = [benchmark(code[label], how) for how in CODE_BENCHMARKS.values()]
        cells += [benchmark(prose.get(label), how) for how in PROSE_BENCHMARKS.values()]
        lines.append([label, *cells])
    seeds = [f"{row.label} {len(row.found)} of {row.planned}" for row in study.rows["headline"]]
    note = (
        f"Means over the finished seeds (code: {', '.join(seeds)}), on held-out modules. "
        "Cross-entropy and calibration error: lower is better; the others: higher.\n"
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


def section(study: Study, experiment: Experiment, figures: Mapping[str, str]) -> str:
    """Question, table, picture of one experiment."""
    rows = study.rows[experiment.name]
    parts = [f"## {experiment.title}\n", f"{experiment.question}\n", experiment_table(rows)]
    if experiment.name == "learning_rate":
        parts.append(words.learning_rates(study.cfg, study.results))
    if experiment.name not in ("headline", "learning_rate"):
        parts.append(picture(figures, experiment.name))
    return "\n".join(parts)


def experiment_table(rows: Sequence[Row]) -> str:
    """A line a label; the baseline has no difference."""
    head = ["", "seeds", "cross-entropy", "less baseline's", "KL to the teacher"]
    head += ["top-1 is the label", "calibration error", "steps ratio", "bytes a token"]
    lines = []
    for row in rows:
        name = f"**{row.label}** (baseline)" if row.is_baseline else row.label
        if not row.found:
            lines.append([name, f"0 of {row.planned}", NOT_RUN, *[""] * 6])
            continue
        lines.append(
            [
                name,
                f"{len(row.found)} of {row.planned}",
                words.figure(row.mean("sft_loss")),
                words.interval(row.against_baseline, signed=True),
                words.figure(row.mean("kd_loss")),
                words.figure(row.mean("top1_label"), percent=True),
                words.figure(row.mean("calibration_error")),
                words.interval(row.steps),
                words.figure(row.bytes_per_token(), digits=0),
            ]
        )
    return table(head, lines)


def choices(study: Study) -> str:
    """Bytes, seconds and quality of one setting at a time, seed 1 of the tuned setting."""
    if study.timed is None:
        return "Not run yet.\n"
    seconds: dict[str, list[float]] = study.timed["seconds"]
    sft, usual, *_ = seconds
    found = {
        label: [r for r in [result_of(study.cfg, run, study.results)] if r is not None]
        for label, run in timed_runs(study.cfg).items()
    }
    head = ["", "bytes a token", "s a step", "of SFT's", "cross-entropy", f"less that of {usual}"]
    lines = []
    for label, times in seconds.items():
        row = Row(label, 1, tuple(found[label]))
        mine = dict(enumerate(found[label]))
        base = {} if label in (sft, usual) else dict(enumerate(found[usual]))
        shares = [time / sft_time for time, sft_time in zip(times, seconds[sft], strict=True)]
        lines.append(
            [
                label,
                words.figure(row.bytes_per_token(), digits=0),
                words.figure(statistics.median(times), digits=2),
                f"{statistics.median(shares):.2f} [{min(shares):.2f}, {max(shares):.2f}]",
                words.figure(row.mean("sft_loss")) or NOT_RUN,
                words.interval(compared(study.cfg, difference, base, mine), signed=True),
            ]
        )
    steps, rounds, threads = study.timed["steps"], len(seconds[sft]), study.timed["threads"]
    note = (
        f"One setting changed at a time. Seconds: medians of {steps} steps, then of {rounds} "
        f"rounds side by side with {threads} thread; in brackets the least and the greatest share "
        "of a round.\n"
    )
    return table(head, lines) + "\n" + note


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
