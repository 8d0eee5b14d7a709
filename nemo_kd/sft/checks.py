"""Rows of an SFT file that cannot be used, and a check of some rows before a training."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from nemo_kd.sft.config import RowConfig
from nemo_kd.sft.hashed import RowError
from nemo_kd.sft.rows import Check, SFTRows

SHOWN = 5
"""Maximum number of bad rows listed in a message."""

CHECKED = 256
"""Maximum number of rows that are checked before a training."""

NOTICED = ("truncated", "cut_answer", "cut_prompt", "altered", "control", "twice")
"""What `Seen` counts."""

KEYS = "|".join(each.name for each in fields(RowConfig))


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


@dataclass
class Seen:
    """Numbers of usable rows of which the user should know."""

    counts: Counter[str] = field(default_factory=Counter)
    example: str = ""
    """One of the control tokens in rows' texts."""

    def add(self, found: Check) -> None:
        # As integers: `update` stores a first bool as it is, and prints it as True.
        self.counts.update({name: int(bool(getattr(found, name))) for name in NOTICED})
        self.example = self.example or found.control

    @classmethod
    def of(cls, parts: Iterable[Seen]) -> Seen:
        """Return the sum of the parts of several ranks."""
        found = list(parts)
        counts = sum((part.counts for part in found), Counter[str]())
        return cls(counts, next((part.example for part in found if part.example), ""))

    def lines(self, of: str, limit: str, altered_by: str) -> Iterator[str]:
        """Yield a line for each number that is not 0.

        `of`: words after the number; `limit`: what truncates rows; `altered_by`: what alters them.
        """
        truncated, answers, prompts, altered, control, twice = (
            self.counts[name] for name in NOTICED
        )
        if truncated:
            line = f"WARNING: {truncated} {of} are longer than {limit} and are truncated"
            if answers:
                line += f"; {answers} of them in the answer, which is learned as if it ended there"
            if prompts:
                line += f"; {prompts} of them keep nothing of their prompt"
            yield line
        if altered:
            yield f"{altered} {of} are altered: {altered_by}"
        if control:
            yield (
                f"{control} {of} have control tokens in their text, such as {self.example}, which "
                "the tokenizer reads as the token itself"
            )
        if twice:
            yield (
                f"{twice} {of} end with two end-of-sequence tokens: their text has one, and "
                "data.add_eos=true adds another"
            )


def spaced(count: int) -> list[int]:
    """Return the numbers of up to `CHECKED` of `count` rows, from the first to the last."""
    numbers = np.linspace(0, count - 1, min(CHECKED, count)).round()
    return [int(number) for number in numbers]


def check_some(rows: SFTRows, limit: str, say: Callable[[str], None]) -> None:
    """Check `CHECKED` rows, evenly spaced from the first to the last, before a training.

    All ranks check the same rows; none of those between is read. `limit`: what messages call the
    maximum length; `say` prints a line for the user, on truncated rows and on the others of `Seen`.
    Errors: RowError with the first unusable rows, which would end the training when they are drawn.
    """
    path = rows.file.path
    numbers = spaced(len(rows))
    bad, seen = BadRowErrors(), Seen()
    for row in numbers:
        try:
            found = rows.check(row)
        except RowError as error:
            bad.add(row, error)
        else:
            seen.add(found)
    of = f"of {len(numbers)} rows{' checked' if len(numbers) < len(rows) else ''}"
    if bad.count:
        raise RowError(
            f"{path}: {bad.text(path, len(numbers))}\nRemove them from the file: a training leaves "
            f"no row out. Rows are read as {rows.template['format']}; data.format sets another "
            "format."
        )
    for line in seen.lines(of, limit, rows.altered_by):
        say(f"{path}: {line}")
