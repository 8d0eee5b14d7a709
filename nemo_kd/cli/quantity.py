"""Numbers on the command line: units, percentages, and refusal of implausible values."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from nemo_kd.errors import StoreError

UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
NUMBER = re.compile(r"([\d_.]+(?:e[+-]?\d+)?)\s*([kmbgt]?)", re.IGNORECASE)


@dataclass(frozen=True)
class Quantity:
    """A kind of number: its option, unit, plausible range and an example."""

    option: str
    of: str
    """What is counted, in the plural, such as parameters."""
    low: float
    high: float
    example: str
    usual: str = ""
    """The unit that a small number without one probably lacks: B for `--teacher 70`."""

    def parse(self, text: str) -> float:
        """`300M` → 3e8; k, M, B (or G) and T. StoreError for anything not in [low, high]."""
        value = number(text)
        if value is None:
            raise StoreError(f"{self.option} takes a number such as {self.example}, not {text!r}")
        if self.low <= value <= self.high:
            return value
        few = "few" if value < self.low else "many"
        raise StoreError(
            f"{self.option} {text} is {value:,.15g} {self.of}, implausibly {few}"
            f"{self._likely(text)}; an example is {self.option} {self.example}"
        )

    def _likely(self, text: str) -> str:
        """` (70B?)` if a unit would make the number plausible."""
        digits = NUMBER.fullmatch(text.strip())
        if digits is None or not self.usual:
            return ""
        guess = digits[1] + self.usual
        return f" ({guess}?)" if self.low <= (number(guess) or 0) <= self.high else ""


def number(text: str) -> float | None:
    """A finite number with an optional unit; None if `text` is not one."""
    match = NUMBER.fullmatch(text.strip())
    try:
        value = float(match[1]) * UNITS[match[2].lower()] if match else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def share(option: str, text: str) -> float:
    """`0.35` or `35%` → 0.35. StoreError outside [0.01, 1): a percentage without its sign."""
    percent = text.strip().endswith("%")
    value = number(text.strip().removesuffix("%"))
    if value is None:
        raise StoreError(f"{option} takes a fraction such as 0.35, or 35%, not {text!r}")
    found = value / 100 if percent else value
    if 0.01 <= found < 1:
        return found
    likely = next((v for v in (value / 100, value) if 0.01 <= v < 1), None)
    meant = "" if likely is None else f"; for {likely:.0%} give {option} {likely:g}"
    raise StoreError(f"{option} {text} is {found:g}, expected from 0.01 to 1{meant}")
