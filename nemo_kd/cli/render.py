"""What the commands print: plain rich tables, no state."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from nemo_kd.cli.row import RowView

BAR = 30  # columns of a histogram's longest bar


def size(count: float) -> str:
    """Bytes in the unit that gives one to three digits before the point."""
    units = ("B", "kB", "MB", "GB", "TB", "PB")
    power = min(int(math.log(max(count, 1), 1000)), len(units) - 1)
    return f"{count / 1000**power:.{1 if power else 0}f} {units[power]}"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def pairs(title: str, values: dict[str, Any]) -> Table:
    """Two columns: a name and its value."""
    table = Table(title=title, show_header=False, title_justify="left", box=None)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in values.items():
        table.add_row(name, Text(str(value)))
    return table


def histogram(title: str, edges: list[float | None], counts: list[int]) -> Table:
    table = Table(title=title, show_header=False, title_justify="left", box=None)
    total, most = max(sum(counts), 1), max([*counts, 1])
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        span = f"{low:g} to {high:g}" if high is not None else f"{low:g} and more"
        table.add_row(span, f"{count / total:6.1%}", "█" * round(BAR * count / most))
    return table


def row(view: RowView) -> RenderableType:
    """The text, then a table with a line for each answer token."""
    text = Text()
    for piece, answer in view.pieces:
        text.append(piece, style="dim" if answer is None else "bold")
    table = Table(title=f"row {view.row}", title_justify="left")
    for name in ("position", "target", "p", "rank", "teacher's choices", "mass"):
        table.add_column(name, justify="right" if name in ("position", "p", "rank") else "left")
    for answer in view.answers:
        choices = Text()
        for choice in answer.top:
            style = "bold green" if choice.id == answer.id else ""
            choices.append(f"{choice.text!r} {choice.probability:.3f}  ", style=style)
        table.add_row(
            str(answer.position),
            Text(repr(answer.text), style="bold green"),
            "not stored" if answer.probability is None else f"{answer.probability:.4f}",
            "" if answer.rank is None else str(answer.rank + 1),
            choices,
            f"{answer.mass:.4f}",
        )
    return Group(text, table)
