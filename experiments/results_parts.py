"""What the page of results is made of: the measurements, tables and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from findings import Row
from omegaconf import DictConfig
from queue_plan import Results
from study import Experiment

NOT_RUN, NOT_PLANNED = "not run yet", "–"
BYTES = "bytes_per_token"
"""The picture of all stores."""


@dataclass(frozen=True)
class Study:
    """The data of the page."""

    cfg: DictConfig
    experiments: Sequence[Experiment]
    rows: Mapping[str, list[Row]]
    """Experiment name → its table."""
    results: Results
    data: Mapping[str, dict[str, Any]]
    """Domain → contents of its data.json."""
    choices: Sequence[Row]
    """Rows that change one setting at a time."""
    timed: Mapping[str, Any] | None
    """Measurements of `time_steps.py`."""
    repeated: Results
    """Runs of a second clone, which made its own teacher and stores."""


def picture(figures: Mapping[str, str], name: str) -> str:
    return f"![{name}]({figures[name]})\n" if name in figures else ""


def table(head: Sequence[str], lines: Iterable[Sequence[str]], *, numbers: bool = True) -> str:
    """A Markdown table; columns of numbers, all but the first, are aligned to the right."""
    rule = ["---", *["---:" if numbers else "---"] * (len(head) - 1)]
    rows = ["| " + " | ".join(cells) + " |" for cells in (head, rule, *lines)]
    return "\n".join(rows) + "\n"
