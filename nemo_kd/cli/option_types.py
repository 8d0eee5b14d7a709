"""Types of argparse options: numbers within bounds, an error of one line for others."""

from __future__ import annotations

import argparse
import math


def count(text: str) -> int:
    """Read a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def count_or_zero(text: str) -> int:
    """Read a whole number of at least 0."""
    return 0 if int(text) == 0 else count(text)


def positive(text: str) -> float:
    """Read a finite number above 0."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return number
