"""What helped and what did not, and what that says of the defaults, for docs/results.md."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

from findings import EXACT, Row, Spreads, verdict
from results_words import (
    DEFAULT,
    ENTROPY_OF,
    Rows,
    by_label,
    compared,
    interval,
    plural,
    signed,
)
from study import Experiment

from nemo_kd.loss import KDConfig
from nemo_kd.teacher.config import TopKConfig

TITLES = {
    "better": "Better than the baseline",
    "worse": "Worse than the baseline",
    "undecided": "Undecided: the interval contains 0, or the difference is within seed noise",
}


def verdicts(experiments: Sequence[Experiment], rows: Rows, spreads: Spreads) -> str:
    """Every comparison, better, worse or undecided; each once, with the most seeds."""
    found: list[tuple[str, frozenset[str], str]] = []  # outcome, compared runs, line
    for experiment in experiments:
        table = by_label(rows[experiment.name])
        for row in table.values():
            outcome = None if row.untrained else verdict(row, spreads)
            if outcome is None or not is_one_question(experiment, row):
                continue
            measure = "exact match " if EXACT in row.right_against_baseline else ""
            line = (
                f"- {experiment.title}: {row.label}, {measure}{compared(row)} vs. {row.baseline} "
                f"({plural(row.compared_seeds, 'seed')})"
            )
            base = table[str(row.baseline)]
            runs = frozenset(result["name"] for each in (base, row) for result in each.found)
            if all(runs != other for _, other, _ in found):  # experiments share runs
                found.append((outcome, runs, line))
    once = [each for each in found if not any(each[1] < other for _, other, _ in found)]
    parts = [
        f"**{title}**\n\n"
        + ("\n".join(line for outcome, _, line in once if outcome == key) or "None so far.")
        + "\n"
        for key, title in TITLES.items()
    ]
    parts.append(
        "Right final answers where they are judged, else final held-out cross-entropy in nats per "
        "token, with 90 % intervals: one in ten comparisons without a real difference excludes 0 "
        f"by chance. {seed_noise(spreads)}\n"
    )
    return "\n".join(parts)


def is_one_question(experiment: Experiment, row: Row) -> bool:
    """Whether a row differs from its baseline in more than the length, and not in two settings."""
    mine, other = experiment.runs[row.label][0], experiment.runs[str(row.baseline)][0]
    if replace(mine, length=other.length, seed=other.seed) == other:
        return False
    return (mine.alpha == 0) == (other.alpha == 0) or mine.tokens == other.tokens


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
        "with one seed, differences below twice that are called undecided."
    )


def defaults(rows: Rows, spreads: Spreads) -> str:
    """The product's defaults, and what was measured to be better or as good."""
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
    lines = [
        f"The recommended settings are the defaults: {listed}. Search the learning rate yourself.\n"
    ]
    lines += [f"- {line}" for line in (prompts(rows, spreads), draws(rows, spreads)) if line]
    if verdict(by_label(rows["math"])[DEFAULT], spreads) == "worse":
        lines.append("- Use SFT for tasks like the worked problems, where KD + SFT was worse.")
    return "\n".join(lines) + "\n"


def prompts(rows: Rows, spreads: Spreads) -> str:
    """Training on the prompts' tokens, where it is better in every domain."""
    found = [
        by_label(rows[name])[f"{DEFAULT}, all tokens"]
        for name in ("tokens", "tokens_depth", "tokens_prose")
    ]
    if any(verdict(row, spreads) != "better" for row in found):
        return ""
    changes = [row.against_baseline.value for row in found if row.against_baseline]
    return (
        "Better than the default for these pruned students: "
        "[training on the prompts' tokens too](#prompts-as-training-text) "
        f"(`model.answer_only_loss=false` in the dump), {min(changes):+.3f} to {max(changes):+.3f} "
        "nats."
    )


def draws(rows: Rows, spreads: Spreads) -> str:
    """The store of draws that is not significantly different from 100 logits."""
    row = by_label(rows["bytes"])["sampled, 40 draws"]
    size = row.bytes_per_token()
    if verdict(row, spreads) not in ("better", "undecided") or size is None:
        return ""
    return (
        f"Not significantly different with {size:.0f} bytes per token: `dump.profile=sampled` with "
        f"[40 draws](#draws-instead-of-100-logits), {compared(row)} nats; for forward KL on "
        "`bucket` or `vocab` at temperature 1 only."
    )


def alternatives(rows: Sequence[Row], spreads: Spreads) -> list[list[str]]:
    """One line per row: seeds, differences on the validation and the test split, and a verdict."""
    lines = []
    for row in rows:
        if (outcome := verdict(row, spreads)) is not None:
            asked = row.by_seed.get("valid", ())
            validation = signed(statistics.fmean(asked)) if asked else ""
            difference = interval(row.against_baseline, is_change=True)
            lines.append([row.label, str(row.compared_seeds), validation, difference, outcome])
    return lines


def default_alpha(code: Sequence[Row], prose: Sequence[Row]) -> str:
    """What the validation splits say about the default alpha."""
    said = []
    for name, rows in (("code", code), ("prose", prose)):
        known = [
            f"{row.label} {signed(statistics.fmean(row.by_seed['valid']))} "
            f"({plural(row.compared_seeds, 'seed')})"
            for row in rows
            if row.by_seed.get("valid")
        ]
        if known:
            said.append(f"{name}: {', '.join(known)}")
    if not said:
        return ""
    return (
        f"Compared with alpha 0.9 on the validation splits, {'; '.join(said)}. The test split of "
        "code had a part in the choice of the default alpha.\n"
    )


def validation_noise(spreads: Spreads) -> str:
    """How far a difference on the validation split varies from seed to seed."""
    spread = spreads["valid"].get("code")
    if spread is None:
        return ""
    return (
        "From seed to seed a difference on the validation split has a standard deviation of "
        f"{spread:.3f}.\n"
    )
