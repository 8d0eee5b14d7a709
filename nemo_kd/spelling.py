"""The known name that a misspelled one resembles."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The most similar of the known names, from a similarity of `cutoff` on (1 is equality)."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """`; did you mean PREFIXname?`, or nothing where no known name is similar."""
    near = nearest(name, known)
    return f"; did you mean {prefix}{near}?" if near else ""
