"""Parse numbers on the command line: units, percentages, and rejection of implausible values."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from nemo_kd.errors import StoreError

UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
NUMBER = re.compile(r"([\d_.]+(?:e[+-]?\d+)?)\s*([kmbgt]?)", re.IGNORECASE)


@dataclass(frozen=True)
class Quantity:
    """A numeric command-line option: its name, unit, plausible range and an example."""

    option: str
    of: str
    """What is counted, in the plural, such as parameters."""
    low: float
    high: float
    example: str
    usual: str = ""
    """The unit probably omitted from a small number: B for `--teacher 70`."""

    def parse(self, text: str) -> float:
        """Parse a number with an optional unit k, M, B (or G) or T, such as `300M`.

        Raises StoreError if it is not a number or not in [low, high].
        """
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
        """Suggest the number with its usual unit, such as ` (70B?)`, if that is plausible."""
        digits = NUMBER.fullmatch(text.strip())
        if digits is None or not self.usual:
            return ""
        guess = digits[1] + self.usual
        return f" ({guess}?)" if self.low <= (number(guess) or 0) <= self.high else ""


def number(text: str) -> float | None:
    """Parse a finite number with an optional unit; return None if `text` is not one."""
    match = NUMBER.fullmatch(text.strip())
    try:
        value = float(match[1]) * UNITS[match[2].lower()] if match else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def share(option: str, text: str) -> float:
    """Parse a fraction given as `0.35` or `35%`.

    Raises StoreError outside [0.01, 1), which suggests a percentage without its sign.
    """
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
