"""Estimate the demo's remaining time: each step's seconds on a reference machine, rescaled by how
long the finished steps took on this one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Seconds on 2 cores of an AMD EPYC, by title up to its first comma (a setting follows).
REFERENCE = {
    "convert the teacher": 10,
    "make code instruction pairs from sympy and networkx": 30,
    "measure the influence of layers": 30,
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
    "measure on held-out data: kd-float32": 25,
    "export the student": 10,
    "load the student with transformers": 30,
}
PRIOR = 60  # seconds at the reference's speed, added to both sides because short steps vary


def reference(title: str) -> float:
    """Return the seconds of a step on the reference machine."""
    return REFERENCE[title.partition(",")[0]]


def seconds_left(remaining: Sequence[str], done: Mapping[str, Mapping[str, Any]]) -> float:
    """Estimate the seconds of the `remaining` titles.

    `done` has the `seconds` of each title finished in this run of the demo or an earlier one.
    """
    here = PRIOR + sum(step["seconds"] for step in done.values())
    there = PRIOR + sum(map(reference, done))
    return here / there * sum(map(reference, remaining))


def time_left(remaining: Sequence[str], done: Mapping[str, Mapping[str, Any]]) -> str:
    """`about 12 min`."""
    return f"about {duration(seconds_left(remaining, done))}"


def duration(seconds: float) -> str:
    """`45 s` or `12 min`."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
