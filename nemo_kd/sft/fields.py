"""Fields of a row that change what is asked or learned, though its format does not read them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from nemo_kd.sft.hashed import RowError
from nemo_kd.sft.messages import LEARNED, REASONING, is_weight

WEIGHTS = ("weight", *LEARNED)
FIELDS = (
    *("instruction", "system", "system_prompt", "context", "question"),
    *("history", "tools", *REASONING),
    *("image", "images", "audio", "audios", "video", "videos", "documents", *WEIGHTS),
)
"""Fields that change what is asked or learned; others, such as `id`, only describe a row."""
EMPTY = ("", "[]", "{}", "null")


def unread_fields(row: Any, read: Collection[str]) -> dict[str, Any]:
    """Return the fields of a row that ask for something and are not in `read`."""
    if not isinstance(row, Mapping):
        return {}
    names = [name for name in FIELDS if name in row and name not in read]
    return {name: row[name] for name in names if _asks(name, row[name])}


def refuse_unread(row: Any, read: Collection[str], reader: str) -> None:
    """Raise RowError if a row has such a field; `reader` says what does not read it."""
    for name, value in unread_fields(row, read).items():
        raise RowError(
            f"{name} is {value!r:.60}, which {reader} does not read; remove the field or the row"
        )


def _asks(name: str, value: Any) -> bool:
    """Whether a field's value changes what is asked or learned; a weight of 1 does not."""
    if name in WEIGHTS:
        return is_weight(name, value)
    return bool(value) and not (isinstance(value, str) and value.strip() in EMPTY)
