"""Fields of rows that a prompt template does not read, though they change what is asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nemo_kd.errors import NemoKDError
from nemo_kd.sft.checks import spaced
from nemo_kd.sft.config import RowConfig
from nemo_kd.sft.files import RowFile
from nemo_kd.sft.hashed import RowError
from nemo_kd.sft.template import field_names

FIELDS = (
    *("instruction", "system", "system_prompt", "context", "question"),
    *("history", "tools", "weight"),
)
"""Fields that change what is asked or learned; others, such as `id`, only describe a row."""
EMPTY = ("", "[]", "{}", "null")


def check_fields(config: RowConfig, file: RowFile, say: Callable[[str], None]) -> None:
    """Compare the fields of some rows with those that the prompt template reads.

    Raises NemoKDError if the default template does not read one that changes what is asked; of
    another template, which was chosen for the file, it is a line for the user.
    """
    template, default = config.prompt_template or "", RowConfig().prompt_template
    found = _unread(file, {*field_names(template), config.label_key})
    if not found:
        return
    names = ", ".join(found)
    if template != default:
        say(f"{file.path}: its rows have {names}, which data.prompt_template does not read")
        return
    texts = "".join(f"{{{name}}}\\n" for name, value in found.items() if isinstance(value, str))
    how = f"set a template that reads it, such as data.prompt_template='{texts}{default}', or "
    if not texts:
        how = "a template reads only texts: write the rows as `messages`, or "
    raise NemoKDError(
        f"{file.path}: its rows have {names}, which the default data.prompt_template='{default}' "
        f"does not read; {how}remove the field from the file"
    )


def _unread(file: RowFile, read: set[str]) -> dict[str, Any]:
    """Return the unread fields of some rows with their first values, in the order of `FIELDS`."""
    names, found = [name for name in FIELDS if name not in read], dict[str, Any]()
    for number in spaced(len(file)):
        try:
            row = file[number]
        except RowError:
            continue  # reported when the rows are checked
        for name in names if isinstance(row, Mapping) else ():
            if name not in found and _asks(name, row.get(name)):
                found[name] = row[name]
    return {name: found[name] for name in names if name in found}


def _asks(name: str, value: Any) -> bool:
    """Whether a field's value is other than none; a weight that is no number only describes."""
    if name == "weight":
        return isinstance(value, int | float) and value != 1
    return bool(value) and not (isinstance(value, str) and value.strip() in EMPTY)
