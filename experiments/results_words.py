"""Figures, intervals and names as docs/results.md writes them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from findings import EXACT, ConfidenceClass, Row
from steps_ratio import Interval

Rows = Mapping[str, list[Row]]
"""Experiment → its table."""
DEFAULT = "KD + SFT, alpha 0.9"
"""Label of the product's default objective in every experiment."""
SEVERAL = "worked problems in several wordings"
ENTROPY_OF = {"code": "code", "prose": "prose", "math": "math", "worded": SEVERAL}


def by_label(rows: Iterable[Row]) -> dict[str, Row]:
    return {row.label: row for row in rows}


def figure(value: float | None, *, percent: bool = False, digits: int = 3) -> str:
    if value is None:
        return ""
    return f"{100 * value:.1f} %" if percent else f"{value:.{digits}f}"


def signed(value: float, digits: int = 3) -> str:
    """`+0.010`; what rounds to 0 has no sign."""
    text = f"{value:+.{digits}f}"
    return text if text.strip("+-0.") else text[1:]


def interval(found: Interval | None, *, is_change: bool = False) -> str:
    """`0.68 [0.61, 0.74]`, or of a change `-0.010 [-0.020, +0.010]`; infinite is `never`."""
    if found is None:
        return ""

    def one(value: float) -> str:
        if math.isinf(value):
            return "never"
        return signed(value) if is_change else f"{value:.2f}"

    return f"{one(found.value)} [{one(found.low)}, {one(found.high)}]"


def points(change: Interval | None) -> str:
    """A difference of two fractions in percentage points, with its interval."""
    if change is None:
        return ""
    value, low, high = (signed(100 * each, 1) for each in (change.value, change.low, change.high))
    return f"{value} points [{low}, {high}]"


def compared(row: Row) -> str:
    """The difference from the baseline: of right final answers where they are judged, else of the
    loss; empty without one."""
    return changed(row.right_against_baseline.get(EXACT), row.against_baseline)


def changed(right: Interval | None, loss: Interval | None) -> str:
    """A difference of right final answers, or without one of the loss."""
    return interval(loss, is_change=True) if right is None else points(right)


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


def class_name(of: ConfidenceClass) -> str:
    if of.low == 0:
        return f"less than {of.high:g}"
    return f"at least {of.low:g}" if of.high == 1 else f"{of.low:g} to {of.high:g}"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def machine(result: Mapping[str, Any]) -> str:
    """The processor of a run."""
    return str(result.get("machine", "unknown processor")).partition(",")[0]
