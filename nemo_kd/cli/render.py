"""Tables, histograms and formatted numbers that the commands print."""

from __future__ import annotations

import math
import sys
from itertools import pairwise
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from nemo_kd.cli.row import RowView
from nemo_kd.visible import visible

MIN_WIDTH = 60
BAR = 30  # columns of a histogram's longest bar


def console() -> Console:
    """Return a console for standard output that is at least MIN_WIDTH wide, to fit the tables.

    It takes no markup: `[/x]` in a file's text is text.
    """
    width = max(Console().width, MIN_WIDTH)
    return Console(width=width, markup=False, emoji=False)


def can_print(text: str) -> bool:
    """Return whether standard output's encoding can represent the text."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def size(count: float) -> str:
    """Format a number of bytes with a decimal unit, such as `1.5 MB`."""
    units = ("B", "kB", "MB", "GB", "TB", "PB")
    power = min(int(math.log(max(count, 1), 1000)), len(units) - 1)
    return f"{count / 1000**power:.{1 if power else 0}f} {units[power]}"


def duration(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours, such as `12 min`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def pairs(title: str, values: dict[str, Any]) -> RenderableType:
    """Lay out names and values as a two-column table with a title."""
    table = Table(show_header=False, box=None)
    table.add_column(style="cyan", overflow="fold")
    table.add_column(overflow="fold")
    for name, value in values.items():
        table.add_row(visible(name), Text(visible(str(value))))
    # rich would wrap the table's own title to the table's width.
    return Group(Text(visible(title), style="bold"), table)


def histogram(
    title: str, edges: list[float | None], counts: list[int], not_kept: int | None = None
) -> RenderableType:
    """Draw a bar for the fraction in each interval, and one for `not_kept` values if given."""
    table = Table(show_header=False, box=None)
    spans = [_span(low, high) for low, high in pairwise(edges)]
    if not_kept is not None:
        spans, counts = [*spans, "not kept"], [*counts, not_kept]
    total, largest = max(sum(counts), 1), max([*counts, 1])
    bar = "█" if can_print("█") else "#"
    for span, count in zip(spans, counts, strict=True):
        table.add_row(span, f"{count / total:6.1%}", bar * round(BAR * count / largest))
    return Group(Text(visible(title), style="bold"), table)


def _span(low: float | None, high: float | None) -> str:
    """Describe the interval [low, high) in words, such as `5 to 8` for the integers of [5, 9)."""
    if high is None:
        return f"{low:g} and more"
    if isinstance(low, int) and isinstance(high, int):
        return str(low) if high == low + 1 else f"{low} to {high - 1}"
    return f"{low:g} to {high:g}"


def row(view: RowView) -> RenderableType:
    """Lay out a sample's text, followed by a table with one line per answer token."""
    text = Text()
    for piece, answer in view.pieces:
        text.append(visible(piece), style="dim" if answer is None else "bold")
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
            "" if answer.rank is None else str(answer.rank),
            choices,
            f"{answer.mass:.4f}",
        )
    return Group(text, table)
