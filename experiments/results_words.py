"""The sentences of docs/results.md, built from the measured values whichever way they turn out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from findings import (
    DOCTESTS,
    EXACT,
    SHOTS,
    ConfidenceClass,
    Row,
    Spreads,
    mean_change,
    right_answers,
    verdict,
)
from queue_plan import Results
from steps_ratio import Interval
from study import Experiment, Run

from nemo_kd.loss import KDConfig
from nemo_kd.teacher.config import TopKConfig

Rows = Mapping[str, list[Row]]
DEFAULT = "KD + SFT, alpha 0.9"
"""Label of the product's default objective in every experiment."""
SEVERAL = "worked problems in several wordings"
ENTROPY_OF = {"code": "code", "prose": "prose", "math": "math", "worded": SEVERAL}


def figure(value: float | None, *, percent: bool = False, digits: int = 3) -> str:
    if value is None:
        return ""
    return f"{100 * value:.1f} %" if percent else f"{value:.{digits}f}"


def interval(found: Interval | None, *, signed: bool = False) -> str:
    """`0.68 [0.61, 0.74]`; an infinite value is `never`."""
    if found is None:
        return ""

    def one(value: float) -> str:
        if math.isinf(value):
            return "never"
        return f"{value:+.3f}" if signed else f"{value:.2f}"

    return f"{one(found.value)} [{one(found.low)}, {one(found.high)}]"


def how_much(experiments: Sequence[Experiment], rows: Rows, results: Results) -> str:
    """Which experiments are finished."""
    names = [e.title for e in experiments if all(row.finished for row in rows[e.name])]
    open_ = [e.title for e in experiments if not all(row.finished for row in rows[e.name])]
    text = f"{len(names)} of {len(experiments)} experiments are finished, {len(results)} runs."
    if open_:
        text += f" Not finished yet: {'; '.join(open_)}."
    return text + "\n"


UNMEASURED = ("run", "seconds", "versions", "machine", "settings")
"""Keys of a result file that are not compared between two runs of the same settings."""


def repeated(results: Results, again: Results) -> str:
    """Whether runs of a second clone have the same results; empty without such runs."""
    sentences = []
    for name, second in again.items():
        if (first := results.get(name)) is None:
            continue
        measured = {what for what in first if what not in UNMEASURED}
        change = second["test"]["sft_loss"] - first["test"]["sft_loss"]
        if all(first[what] == second.get(what) for what in measured):
            how = "equal to the last digit"
        else:
            how = f"cross-entropy {change:+.6f}"
        old, new = machine(first), machine(second)
        if old != new:
            how += f", on another processor ({new} instead of {old})"
        sentences.append(f"`{name}` {how}")
    if not sentences:
        return ""
    return (
        "Runs repeated from a fresh clone and environment, with a teacher and stores made anew: "
        f"{'; '.join(sentences)}.\n"
    )


def summary(rows: Rows) -> str:
    """What a practitioner needs: KD + SFT after the same steps, after fewer, and what to set."""
    lines = [line for line in (same_steps(rows), fewer_steps(rows)) if line]
    if not lines:
        return "Not run yet.\n"
    lines.append(
        "- **Set** the [defaults](#recommended-settings), search the "
        "[learning rate](#learning-rates) anew, and compare with SFT at its own learning rate, by "
        "your task's metric."
    )
    return (
        "Students of 8 to 15 of the 30 layers of SmolLM2-135M-Instruct, trained on a CPU; larger "
        "ones have not been measured.\n\n" + "\n".join(lines) + "\n"
    )


def same_steps(rows: Rows) -> str:
    """Where KD + SFT is better than SFT after the same steps, and where it is not."""
    groups: dict[str, list[str]] = {"better than SFT": [], "worse": [], "undecided": []}
    for name, table in {
        "code with 8 layers": rows["headline"],
        "code with 15 layers": rows["knowledge"],
        "prose with 8 layers": rows["prose"],
        "worked problems": rows["math"],
    }.items():
        sft, kd = (next(row for row in table if row.label == each) for each in ("SFT", DEFAULT))
        if (outcome := verdict(kd)) is not None:
            key = next(key for key in groups if key.startswith(outcome))
            groups[key].append(f"{name} ({change(sft, kd)}, {plural(len(kd.found), 'seed')})")
    said = [f"{key} on {', '.join(names)}" for key, names in groups.items() if names]
    return f"- **After the same steps** KD + SFT is {'; it is '.join(said)}." if said else ""


def change(sft: Row, kd: Row) -> str:
    """KD + SFT beside SFT: right final answers where they are judged, else cross-entropy."""
    if EXACT in kd.right_against_baseline:
        shares = [figure(row.right(EXACT), percent=True) for row in (kd, sft)]
        return f"{shares[0]} of the final answers right instead of {shares[1]}"
    return f"{interval(kd.against_baseline, signed=True)} nats per token"


def fewer_steps(rows: Rows) -> str:
    """How shorter trainings compare with the complete SFT."""
    table = {row.label: row for row in rows["budget"]}
    said = []
    for share in ("70 % of the steps", "50 % of the steps"):
        kd, sft = (table[f"{label}, {share}"] for label in (DEFAULT, "SFT"))
        if kd.against_baseline is not None:
            text = f"with {share} KD + SFT {interval(kd.against_baseline, signed=True)}"
            if sft.against_baseline is not None:
                text += f", SFT {interval(sft.against_baseline, signed=True)}"
            said.append(text + f" ({plural(len(kd.found), 'seed')})")
    if not said:
        return ""
    return (
        "- **With fewer steps**, compared with SFT after all of them, in nats per token on code "
        f"with 8 layers: {'; '.join(said)}. NVIDIA's "
        "[student of 15B](evaluation.md#the-published-benchmarks) has better scores than SFT's on "
        "most benchmarks with 70 % of the steps."
    )


def within_a_run(rows: Sequence[Row]) -> str:
    """At which step KD + SFT has the loss of the complete SFT."""
    kd = next(row for row in rows if row.label == DEFAULT)
    if kd.steps is None:
        return ""
    return (
        f"{DEFAULT} {reaching(kd)}. Stopping there saves nothing, as the learning rate has not "
        "decayed yet; [shorter trainings](#fewer-steps) have a schedule of their own.\n"
    )


def reaching(row: Row) -> str:
    """At which step SFT's best loss is reached, if it is."""
    if row.steps is None or row.sft_best is None or math.isinf(row.steps.value):
        return "does not reach SFT's best loss"
    return f"reaches SFT's best loss, that of step {row.sft_best}, at step {reached(row)}"


def reached(row: Row) -> str:
    """`101 [92, 110]`, the step at which SFT's best loss is reached; empty where not compared."""
    if row.steps is None or row.sft_best is None:
        return ""
    values = (row.sft_best * each for each in (row.steps.value, row.steps.low, row.steps.high))
    value, low, high = ("never" if math.isinf(each) else f"{each:.0f}" for each in values)
    return f"{value} [{low}, {high}]"


EVERY_TOKEN = f"{DEFAULT}, all tokens"
PROMPTS = {
    "code with 8 layers": "",
    "code with 15 layers": "_depth",
    "prose with 8 layers": "_prose",
}
"""Domain → end of the names of its experiments on the prompts' tokens."""


def prompts_too(rows: Rows) -> list[list[str]]:
    """One line per domain: what the prompts' tokens add to KD + SFT and to SFT, and both beside."""
    lines = []
    for name, end in PROMPTS.items():
        table = {row.label: row for row in rows[f"tokens{end}"]}
        sft, both = rows[f"all_tokens{end}"]
        gains = [mean_change(table[DEFAULT], table[EVERY_TOKEN]), mean_change(table["SFT"], sft)]
        seeds = [min(len(table[EVERY_TOKEN].found), len(table[DEFAULT].found)), len(sft.found)]
        cells = [
            "" if gain is None else f"{gain:+.3f} ({plural(count, 'seed')})"
            for gain, count in zip(gains, seeds, strict=True)
        ]
        lines.append(
            [name, *cells, interval(both.against_baseline, signed=True), reached(both)]
            if any(cells)
            else [name, "", "", "", ""]
        )
    return lines


def points(change: Interval | None) -> str:
    """A difference of two fractions in percentage points, with its interval."""
    if change is None:
        return ""
    low, value, high = (100 * each for each in (change.low, change.value, change.high))
    return f"{value:+.1f} points [{low:+.1f}, {high:+.1f}]"


def inherited(rows: Sequence[Row], teacher: Row | None) -> str:
    """Whether the student's errors are the teacher's: answers that one objective alone has right.

    Compared over the seeds that SFT, the first row, and KD, the second, both have.
    """
    sft, kd = (right_answers(row.found, EXACT) for row in rows[:2])
    taught = right_answers(teacher.found, EXACT) if teacher else None
    if sft is None or kd is None or taught is None:
        return ""
    seeds = min(len(sft.values), len(kd.values))
    wrong = taught.values[0] == 0  # [1, questions]
    only_sft = sft.values[:seeds] > kd.values[:seeds]  # [seeds, 1, questions]
    only_kd = kd.values[:seeds] > sft.values[:seeds]
    return (
        f"The teacher has {100 * wrong.mean():.0f} % of the answers wrong. Of the {only_sft.size} "
        f"answers of {plural(seeds, 'seed')}, only SFT has {only_sft.sum()} right, of which the "
        f"teacher has {(only_sft & wrong).sum()} wrong; only {rows[1].label} has {only_kd.sum()} "
        f"right, of which the teacher has {(only_kd & wrong).sum()} wrong.\n"
    )


def beyond_the_teacher(rows: Sequence[Row], teacher: Row | None) -> str:
    """Which students of longer trainings have more answers right than their teacher."""
    limit = teacher.right(EXACT) if teacher else None
    shares = {row.label: share for row in rows if (share := row.right(EXACT)) is not None}
    if limit is None or not shares:
        return ""
    listed = ", ".join(
        f"{label}, {100 * share:.1f} %, {'above' if share > limit else 'not above'} the teacher"
        for label, share in shares.items()
    )
    return f"The teacher has {100 * limit:.1f} % right. {listed}.\n"


def gain_by_task(rows: Sequence[Row], teacher: Row | None, tasks: Sequence[str]) -> str:
    """How right the teacher is on each task, and what KD, the second row, gains over SFT there."""
    each = [row.right_by_task(len(tasks)) for row in (teacher, *rows[:2]) if row is not None]
    shares = [share for share in each if share is not None]
    if len(shares) < 3 or not tasks:
        return ""
    said = [
        f"{task} {100 * taught:.0f} % ({100 * (kd - sft):+.0f} points)"
        for task, taught, sft, kd in zip(tasks, *shares, strict=True)
    ]
    return (
        "By task, right answers of the teacher, and in brackets the gain of "
        f"{rows[1].label} over SFT: {', '.join(said)}.\n"
    )


def unsure(results: Results, worded: Sequence[Row]) -> str:
    """How much the teacher's distribution says beyond the label: its entropy, and if that decides.

    `worded`: the worked problems that differ from others in their entropy only.
    """
    found = {
        label: results[name]["test"]["teacher_entropy"]
        for domain, label in ENTROPY_OF.items()
        if (name := Run(domain=domain, layers=30, length=0).name) in results
    }
    if not found:
        return ""
    values = ", ".join(f"{value:.3f} on {label}" for label, value in found.items())
    text = f"Entropy of the fine-tuned teacher, nats per held-out answer token: {values}."
    kd = next(row for row in worded if row.label == DEFAULT)
    gain = kd.right_against_baseline.get(EXACT)
    if gain is not None and {"math", SEVERAL} <= found.keys():
        text += (
            f" With several wordings it is {found[SEVERAL] / found['math']:.0f} times that with "
            f"one; KD + SFT has {points(gain)} right answers compared with SFT."
        )
    return text + "\n"


def where_it_differs(found: Mapping[str, Sequence[ConfidenceClass]]) -> str:
    """At which labels KD + SFT gains or loses most, by the teacher's probability of them."""
    said = []
    for domain, classes in found.items():
        whole = sum(each.part for each in classes)
        most = max(classes, key=lambda each: abs(each.part))
        said.append(
            f"on {domain} {100 * most.part / whole:.0f} % of it ({most.part:+.4f} of {whole:+.4f} "
            f"nats) is at the {figure(most.share, percent=True)} of tokens to whose label the "
            f"teacher gives a probability of {class_name(most)}"
        )
    if not said:
        return ""
    return f"Most of the difference of KD + SFT from SFT: {'; '.join(said)}.\n"


def class_name(of: ConfidenceClass) -> str:
    if of.low == 0:
        return f"less than {of.high:g}"
    return f"at least {of.low:g}" if of.high == 1 else f"{of.low:g} to {of.high:g}"


def larger_students(rows: Sequence[Row]) -> str:
    """Whether questions and doctests tell the objectives apart."""
    gains = [
        gain
        for row in rows
        for what in (*SHOTS.values(), DOCTESTS)
        if (gain := row.right_against_baseline.get(what)) is not None and row.steps is not None
    ]
    if not gains:
        return ""
    text = "Guessing gives 25 % of OpenBookQA."
    if all(gain.low <= 0 <= gain.high for gain in gains):
        text += " No interval excludes 0: questions and doctests do not tell KD + SFT from SFT."
    return text + "\n"


def verdicts(experiments: Sequence[Experiment], rows: Rows, spreads: Spreads) -> str:
    """Every comparison, better, worse or undecided; each once, with the most seeds."""
    found: list[tuple[str, frozenset[str], str]] = []  # outcome, compared runs, line
    for experiment in experiments:
        base = [row for row in rows[experiment.name] if row.is_baseline]
        for row in rows[experiment.name]:
            outcome = None if row.untrained else verdict(row, spreads)
            if outcome is None:
                continue
            right = points(row.right_against_baseline.get(EXACT))
            difference = interval(row.against_baseline, signed=True)
            line = (
                f"- {experiment.title}: {row.label}, "
                f"{f'exact match {right}' if right else difference} vs. "
                f"{experiment.baseline} ({plural(len(row.found), 'seed')})"
            )
            runs = frozenset(result["name"] for each in (*base, row) for result in each.found)
            if all(runs != other for _, other, _ in found):  # experiments share runs
                found.append((outcome, runs, line))
    once = [each for each in found if not any(each[1] < other for _, other, _ in found)]
    titles = {
        "better": "Better than the baseline",
        "worse": "Worse than the baseline",
        "undecided": "Undecided: the interval contains 0, or the difference is within seed noise",
    }
    parts = [
        f"**{title}**\n\n"
        + ("\n".join(line for outcome, _, line in once if outcome == key) or "None so far.")
        + "\n"
        for key, title in titles.items()
    ]
    parts.append(
        "Right final answers where they are judged, else final held-out cross-entropy in nats per "
        "token, with 90 % intervals: of ten comparisons without a difference, one is outside by "
        f"chance. {seed_noise(spreads)}\n"
    )
    return "\n".join(parts)


def seed_noise(spreads: Spreads) -> str:
    """How far a difference varies from seed to seed, and what that means for one seed."""
    text = "With one seed, the interval covers the sampling of the test data only"
    known = [
        f"{spreads['test'][domain]:.3f} nats on {name}"
        for domain, name in ENTROPY_OF.items()
        if domain in spreads["test"]
    ]
    known += [
        f"{100 * spread:.1f} points of right answers on {ENTROPY_OF[domain]}"
        for domain, spread in spreads[EXACT].items()
    ]
    if not known:
        return text + "."
    return (
        f"{text}. From seed to seed a difference has a standard deviation of {', '.join(known)}: "
        "of one seed, less than twice that is undecided."
    )


def defaults() -> str:
    """The product's defaults."""
    loss, store = KDConfig(), TopKConfig()
    values = {
        "model.kd.alpha": f"{loss.weights[1]:g}",
        "model.kd.support": loss.support,
        "model.kd.divergence": loss.divergence,
        "model.kd.temperature": f"{loss.temperature:g}",
        "dump.top_k": str(store.top_k),
        "dump.profile": store.profile,
    }
    listed = ", ".join(f"`{key}={value}`" for key, value in values.items())
    return (
        f"The recommended settings are the defaults: {listed}. Search the learning rate yourself: "
        "the best for KD + SFT differs from SFT's.\n"
    )


def alternatives(rows: Sequence[Row], spreads: Spreads) -> list[list[str]]:
    """One line per row: seeds, differences on the validation and the test split, and a verdict."""
    lines = []
    for row in rows:
        if (outcome := verdict(row, spreads)) is not None:
            asked = row.by_seed.get("valid", ())
            validation = f"{statistics.fmean(asked):+.3f}" if asked else ""
            difference = interval(row.against_baseline, signed=True)
            lines.append([row.label, str(len(row.found)), validation, difference, outcome])
    return lines


def default_alpha(code: Sequence[Row], prose: Sequence[Row]) -> str:
    """What the validation splits say about the default alpha."""
    said = []
    for name, rows in (("code", code), ("prose", prose)):
        known = [
            f"{row.label} {statistics.fmean(row.by_seed['valid']):+.3f} "
            f"({plural(len(row.by_seed['valid']), 'seed')})"
            for row in rows
            if row.by_seed.get("valid")
        ]
        if known:
            said.append(f"of {name} {', '.join(known)}")
    if not said:
        return ""
    return f"Compared with alpha 0.9 on the validation split {'; '.join(said)}.\n"


def validation_noise(spreads: Spreads) -> str:
    """How far a difference on the validation split varies from seed to seed."""
    spread = spreads["valid"].get("code")
    if spread is None:
        return ""
    return (
        "From seed to seed a difference on the validation split has a standard deviation of "
        f"{spread:.3f}.\n"
    )


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def machine(result: Mapping[str, Any]) -> str:
    """The processor of a run."""
    return str(result.get("machine", "unknown processor")).partition(",")[0]
