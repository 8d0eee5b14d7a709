"""What the study set out to reach, what it measured, and what it left out, for docs/results.md."""

from __future__ import annotations

import math

from findings import TOLERANCE, Row
from results_parts import NOT_RUN, table
from results_words import DEFAULT, Rows, by_label, interval, plural

ALL_TOKENS = f"{DEFAULT}, all tokens"
STEPS_RATIOS = (
    ("code, 8 layers, answers", "headline", DEFAULT, 0.45),
    ("code, 8 layers, KD + SFT on all tokens", "tokens", ALL_TOKENS, 0.45),
    ("code, 8 layers, both on all tokens", "all_tokens", DEFAULT, 0.45),
    ("prose, 8 layers, answers", "prose", DEFAULT, 0.5),
    ("prose, 8 layers, KD + SFT on all tokens", "tokens_prose", ALL_TOKENS, 0.5),
    ("prose, 8 layers, both on all tokens", "all_tokens_prose", DEFAULT, 0.5),
    ("code, 15 layers, answers", "knowledge", DEFAULT, 0.6),
    ("code, 15 layers, KD + SFT on all tokens", "tokens_depth", ALL_TOKENS, 0.6),
    ("code, 15 layers, both on all tokens", "all_tokens_depth", DEFAULT, 0.6),
    ("worked problems", "math", DEFAULT, 0.5),
)
"""Name, experiment, label and the largest steps ratio aimed at."""
MOST_BYTES, MOST_LOSS = 20, 0.01
"""The aim of a small store: bytes per token, and the upper end of its difference from K = 100."""
NOT_MEASURED = (
    "Not measured: 50 % of the steps on prose, shorter trainings with 15 layers, 80 draws, several "
    "answers of the teacher per prompt where it words them differently, and rounds with the same "
    "compute to the hour.\n\n"
    "Measured and dropped, one run each: the teacher's remaining mass given to the label instead "
    "of a bucket (-0.007 nats, within the noise of a seed); distillation only at the half or fifth "
    "of tokens with the largest entropy of the student (+0.185 and +0.736 nats).\n"
)


def targets(rows: Rows) -> str:
    """The steps ratios aimed at beside those measured, and the same for a small store."""
    lines = []
    for name, experiment, label, most in STEPS_RATIOS:
        row = by_label(rows[experiment])[label]
        if row.steps is None:
            lines.append([name, f"<= {most:.2f}", NOT_RUN, "", ""])
            continue
        measured = f"{interval(row.steps)} ({plural(len(row.found), 'seed')})"
        reached = "yes" if round(row.steps.value, 2) <= most else "no"
        lines.append([name, f"<= {most:.2f}", measured, flat(row), reached])
    head = ["steps ratio", "target", "measured", "to SFT's nearly best step", "reached"]
    note = (
        "Nearly best: SFT's loss may be flat long before its best step; the column has the ratio "
        f"to SFT's first step within {TOLERANCE:g} nats of its best.\n"
    )
    return "\n".join([table(head, lines), note, smallest_store(rows), NOT_MEASURED])


def flat(row: Row) -> str:
    """The ratio to SFT's first step that is nearly its best, and that step."""
    if row.nearly_best is None:
        return ""
    step, at = row.nearly_best
    return f"{'never' if math.isinf(at) else f'{at / step:.2f}'} (step {step})"


def smallest_store(rows: Rows) -> str:
    """The smallest store whose difference from K = 100 stays below the limit, per domain."""
    said = []
    for domain, experiment in (("code", "bytes"), ("worked problems", "bytes_math")):
        fine = [
            (size, row)
            for row in rows[experiment]
            if row.against_baseline is not None
            and row.against_baseline.high < MOST_LOSS
            and (size := row.bytes_per_token()) is not None
        ]
        if not fine:
            continue
        size, row = min(fine, key=lambda each: each[0])
        reached = "reached" if size <= MOST_BYTES else "not reached"
        said.append(
            f"on {domain} {reached}: {size:.0f} bytes ({row.label}, "
            f"{interval(row.against_baseline, is_change=True)}, "
            f"{plural(row.compared_seeds, 'seed')})"
        )
    if not said:
        return ""
    return (
        f"A store of at most {MOST_BYTES} bytes per token whose difference from K = 100 ends below "
        f"+{MOST_LOSS:g} nats was {'; '.join(said)}.\n"
    )
