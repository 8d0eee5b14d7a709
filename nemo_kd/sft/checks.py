"""Rows of an SFT file that cannot be used, and a check of some rows before a training."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from nemo_kd.sft.config import RowConfig
from nemo_kd.sft.hashed import RowError
from nemo_kd.sft.rows import SFTRows

SHOWN = 5
"""Maximum number of bad rows listed in a message."""

CHECKED = 256
"""Maximum number of rows that are checked before a training."""

KEYS = "|".join(field.name for field in dataclasses.fields(RowConfig))


def named(text: str, where: str) -> str:
    """Return a message of the reader, which calls its settings `data`, for the block `where`."""
    return re.sub(rf"\bdata\.(?=(?:{KEYS})\b)", f"{where}.", text)


class BadRowErrors:
    """The number of bad rows, and the errors of the first few."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[tuple[int, str]] = []

    def add(self, row: int, error: RowError) -> None:
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append((row, str(error)))

    @classmethod
    def of(cls, parts: Iterable[BadRowErrors]) -> BadRowErrors:
        """Combine the bad rows of several ranks."""
        found = cls()
        for part in parts:
            found.count += part.count
            found.first = sorted(found.first + part.first)[:SHOWN]
        return found

    def text(self, path: Path, checked: int) -> str:
        lines = [error.removeprefix(f"{path}, ") for _, error in self.first]
        more = [f"and {self.count - len(lines)} more"] * (self.count > len(lines))
        shown = "".join(f"\n  {line}" for line in [*lines, *more])
        return f"{self.count} of {checked} rows that cannot be used:{shown}"


def spaced(count: int) -> list[int]:
    """Return the numbers of up to `CHECKED` of `count` rows, from the first to the last."""
    numbers = np.linspace(0, count - 1, min(CHECKED, count)).round()
    return [int(number) for number in numbers]


def check_some(rows: SFTRows, limit: str, say: Callable[[str], None]) -> None:
    """Check `CHECKED` rows, evenly spaced from the first to the last, before a training.

    All ranks check the same rows; none of those between is read. `limit`: what messages call the
    maximum length; `say` prints a line for the user, on truncated and on altered rows.
    Errors: RowError with the first unusable rows, which would end the training when they are drawn.
    """
    path = rows.file.path
    numbers = spaced(len(rows))
    bad, truncated, altered = BadRowErrors(), 0, 0
    for row in numbers:
        try:
            found = rows.check(row)
        except RowError as error:
            bad.add(row, error)
        else:
            truncated += found.truncated
            altered += found.altered
    of = f"of {len(numbers)} rows{' checked' if len(numbers) < len(rows) else ''}"
    if bad.count:
        raise RowError(
            f"{path}: {bad.text(path, len(numbers))}\nRemove them from the file: a training leaves "
            f"no row out. Rows are read as {rows.template['format']}; data.format sets another "
            "format."
        )
    if truncated:
        say(f"{path}: WARNING: {truncated} {of} are longer than {limit} and are truncated")
    if altered:
        say(f"{path}: {altered} {of} are altered: {rows.altered_by}")
