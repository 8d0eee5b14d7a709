"""Check that `prompt_template` ends with the answer's field and that rows have its fields."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from nemo_kd.errors import NemoKDError

OTHER_FORMATS = {"messages", "conversations", "text"}
"""Formats without a template; a row of one has a field of that name."""


def check_template(
    block: Mapping[str, Any], where: str, first_rows: Iterable[tuple[str, Any]] = ()
) -> None:
    """Check the template of a data block against the block's keys and the first row of each file.

    `first_rows`: paths and their first rows, None for what cannot be read.

    Errors: NemoKDError that names the key to change, in the block at `where`.
    """
    template, label = block.get("prompt_template"), block.get("label_key")
    if template is None or label is None or block.get("format") in OTHER_FORMATS:
        return
    key, names = f"{where}.prompt_template", re.findall("{(.*?)}", template)
    if any(brace in re.sub("{[^{}]*}", "", template) for brace in "{}"):
        raise NemoKDError(
            f"{key}={template!r} has an unmatched brace: braces name fields, and a template can "
            "hold no others"
        )
    if label not in names:
        raise NemoKDError(
            f"{key}={template!r} has no {{{label}}}, the answer's field "
            f"({where}.label_key={label}): end it with {{{label}}}"
        )
    if not template.endswith(f"{{{label}}}") or names.count(label) > 1:
        raise NemoKDError(
            f"{key}={template!r}: the answer's field {{{label}}} must appear once, at the end"
        )
    fields = block.get("truncation_field")
    for name in str(fields).replace(" ", "").split(",") if fields else ():
        if name not in names and (name, names[0]) != ("context", "input"):  # NeMo's old name
            others = [each for each in names if each != label]
            lose = (
                f"{' or '.join(others)}, which loses the tokens of rows that are too long, or to "
            )
            raise NemoKDError(
                f"{where}.truncation_field={name} is not a field of {key}={template!r}: set it to "
                f"{lose if others else ''}null"
            )
    for path, row in first_rows:
        if isinstance(row, dict):  # the reader refuses other rows
            _check_first_row(path, row, names, key, label)


def _check_first_row(
    path: str, row: dict[str, Any], names: list[str], key: str, label: str
) -> None:
    if row.keys() & OTHER_FORMATS:
        return  # a conversation or a text, unless the reader refuses it
    missing = [name for name in names if name not in row and name != label]
    if missing:
        raise NemoKDError(
            f"{key} names {{{missing[0]}}}, which the rows of {path} do not have: the first has "
            f"{', '.join(islice(row, 10)) or 'no fields'}"
        )
