"""How long the rest of the demo takes: each step's seconds on a reference machine, rescaled by
how long the finished steps took here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# The whole demo on 2 cores of an AMD EPYC. A title's text after a comma is a setting.
REFERENCE = {
    "convert the teacher": 10,
    "code instruction pairs from sympy and networkx": 30,
    "the layers that matter least": 30,
    "prune the student": 10,
    "fine-tune the teacher": 150,
    "dump the teacher's top-100 (train)": 100,
    "dump the teacher's top-100 (heldout)": 30,
    "student: SFT": 290,
    "student: KD + SFT": 300,
    "measure on held-out data: teacher": 20,
    "measure on held-out data: student": 20,
    "measure on held-out data: sft": 20,
    "measure on held-out data: kd": 20,
    "complete held-out prompts": 60,
}
PRIOR = 60  # seconds for which this machine counts as fast as the reference: short steps vary


def reference(title: str) -> float:
    """Seconds of a step on the reference machine."""
    return REFERENCE[title.partition(",")[0]]


def seconds_left(remaining: Sequence[str], done: Mapping[str, Mapping[str, Any]]) -> float:
    """For the titles that remain; `done` has the `seconds` of each finished title, of this run of
    the demo or an earlier one."""
    here = PRIOR + sum(step["seconds"] for step in done.values())
    there = PRIOR + sum(map(reference, done))
    return here / there * sum(map(reference, remaining))


def time_left(remaining: Sequence[str], done: Mapping[str, Mapping[str, Any]]) -> str:
    """`about 12 min`."""
    return f"about {duration(seconds_left(remaining, done))}"


def duration(seconds: float) -> str:
    """`45 s` or `12 min`."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
