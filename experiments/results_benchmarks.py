"""The first table of docs/results.md: benchmarks against methods, as such results are published."""

from __future__ import annotations

from collections.abc import Mapping

import results_words as words
from findings import DOCTESTS, EXACT, SHOTS, Row, answers
from results_parts import NOT_PLANNED, NOT_RUN, Study, table

METHODS = {
    "teacher": "Teacher, fine-tuned",
    "SFT": "SFT",
    "SFT, 70 %": "SFT, 70 % of the steps",
    "SFT, 50 %": "SFT, 50 % of the steps",
    "KD + SFT": words.DEFAULT,
    "KD + SFT, 70 %": f"{words.DEFAULT}, 70 % of the steps",
    "KD + SFT, 50 %": f"{words.DEFAULT}, 50 % of the steps",
}
"""Column of the first table → label in the experiments."""
LARGER = "code, 15 layers"
TOO = "trained on all tokens"
WORDED = "math, several wordings"
EXPERIMENTS = {
    "code": ("reference", "budget", "headline"),
    f"code, {TOO}": ("all_tokens",),
    "prose": ("prose_budget", "prose"),
    f"prose, {TOO}": ("all_tokens_prose",),
    "math": ("math_reference", "math_budget", "math"),
    LARGER: ("knowledge",),
    f"{LARGER}, {TOO}": ("all_tokens_depth",),
}
"""Domain → experiments of the first table; of equal labels the last one counts."""
LOSS, STEPS = ("loss", "sft_loss"), ("steps", "")
GENERATED = {"parses": "function parses", "exact": EXACT}
COMMON = {"cross-entropy": LOSS, "steps to SFT's best": STEPS}
BENCHMARKS: dict[str, dict[str, tuple[str, str]]] = {
    "code": {**COMMON, GENERATED["parses"]: ("share", "parses")},
    f"code, {TOO}": COMMON,
    "prose": COMMON,
    f"prose, {TOO}": COMMON,
    "math": {EXACT: ("right", EXACT), **COMMON},
    LARGER: {**COMMON, **{what: ("right", what) for what in (DOCTESTS, *SHOTS.values())}},
    f"{LARGER}, {TOO}": COMMON,
}
"""Domain → benchmark → how a cell is read, and of what."""


def published_table(study: Study) -> str:
    """One row per benchmark and one column per method, as such results are published."""
    found = benchmark_rows(study)
    head = ["", "seeds", *METHODS, "KD + SFT minus SFT"]
    lines = []
    for domain, benchmarks in BENCHMARKS.items():
        rows = [found[domain].get(label) for label in METHODS.values()]
        kd = found[domain].get(METHODS["KD + SFT"])
        for name, how in benchmarks.items():
            seeds = "" if kd is None else f"{len(kd.found)} of {kd.planned}"
            cells = [benchmark(row, *how, kd) for row in rows]
            lines.append([f"{domain}: {name}", seeds, *cells, gain(kd, *how)])
    return table(head, lines) + "\n" + published_note(found)


def benchmark_rows(study: Study) -> dict[str, dict[str, Row]]:
    """Domain → label → row; a label is the same method in every domain."""
    found: dict[str, dict[str, Row]] = {}
    for domain, names in EXPERIMENTS.items():
        rows = [row for name in names for row in study.rows[name]]
        found[domain] = {row.label: row for row in rows if row.label in METHODS.values()}
    return found


def published_note(found: Mapping[str, Mapping[str, Row]]) -> str:
    """What the columns are, and how sure the fractions of right answers are."""
    questions = {}
    for domain, name, what in (
        ("code", GENERATED["parses"], "functions"),
        ("math", EXACT, "answers"),
        (LARGER, DOCTESTS, "functions"),
        (LARGER, "OpenBookQA", "questions"),
    ):
        rows = found[domain].values()
        if name == GENERATED["parses"]:
            sizes = {r["generation"]["samples"] for x in rows for r in x.found if "generation" in r}
        else:
            full = SHOTS["0"] if name == "OpenBookQA" else name
            sizes = {len(answers(r)[full]) for x in rows for r in x.found if full in answers(r)}
        if sizes:
            size = min(sizes)
            questions[name] = f"{name}: {size} {what}, up to {50 / size**0.5:.1f} points"
    return (
        f"Means over the finished seeds, on held-out modules of code and prose and held-out "
        f"questions; KD + SFT has alpha 0.9; {NOT_PLANNED}: not measured. Lower is better for "
        "cross-entropy (nats per token) and steps, higher for the others. Steps to SFT's best: the "
        "step at which the loss is SFT's lowest, which SFT itself has at the step of its column. "
        "Trainings with 70 % and 50 % of the steps have a complete learning-rate schedule. One "
        f"standard error of a percentage: {'; '.join(questions.values()) or NOT_RUN}.\n"
    )


def benchmark(row: Row | None, kind: str, metric: str, kd: Row | None) -> str:
    """A cell; with the number of seeds of a trained row where it is not that of KD + SFT."""
    if row is None:
        return NOT_PLANNED
    if kind == "steps":
        never_trained = row.found and row.steps is None
        text = NOT_PLANNED if never_trained else words.reached(row) or NOT_RUN
        if row.is_baseline and kd is not None and kd.sft_best is not None:
            text = str(kd.sft_best)
    else:
        reading = {"share": row.share, "right": row.right}.get(kind, row.mean)
        value = reading(metric)
        if value is None:
            text = NOT_PLANNED if row.finished else NOT_RUN
        else:
            text = f"{value:.3f}" if kind == "loss" else f"{100 * value:.1f} %"
    if text in (NOT_PLANNED, NOT_RUN) or row.untrained:
        return text
    if kd is None or len(row.found) == len(kd.found):
        return text
    return f"{text} ({words.plural(len(row.found), 'seed')})"


def gain(row: Row | None, kind: str, metric: str) -> str:
    """The difference from SFT, with its interval; empty where there is none."""
    if row is None or kind in ("steps", "share"):
        return ""
    if kind == "loss":
        return words.interval(row.against_baseline, is_change=True)
    return words.points(row.right_against_baseline.get(metric))
