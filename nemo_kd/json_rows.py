"""JSON of a row, in which an object may have each key only once.

The standard library keeps the last of two values of a key, and silently drops the other.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

BOM = "\ufeff"


class RepeatedKeyError(ValueError):
    """A JSON object that has a key twice."""


def parsed(text: str) -> Any:
    """Return the value of a JSON text.

    Errors: RepeatedKeyError, and those of `json.loads`.
    """
    if text.startswith(BOM):
        return json.loads(text)  # raises, with a message about it
    return _DECODER.decode(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise RepeatedKeyError(f"the key {key!r:.60} appears twice")
    return value


# One decoder for all rows: `json.loads` with a hook makes one for each, which takes longer than
# the hook itself.
_DECODER = json.JSONDecoder(object_pairs_hook=_object)
