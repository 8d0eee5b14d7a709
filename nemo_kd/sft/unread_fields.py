"""Fields of rows that a prompt template does not read, though they change what is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nemo_kd.errors import NemoKDError
from nemo_kd.sft.checks import spaced
from nemo_kd.sft.config import RowConfig
from nemo_kd.sft.fields import FIELDS, unread_fields
from nemo_kd.sft.files import RowFile
from nemo_kd.sft.hashed import RowError
from nemo_kd.sft.template import field_names


def check_fields(
    config: RowConfig, file: RowFile, say: Callable[[str], None], *, chosen: bool
) -> None:
    """Compare the fields of some rows with those that a prompt template, or `text`, reads.

    Raises NemoKDError if one that changes what is asked is not read; where the template or format
    was chosen for the file, `chosen`, it is a line for the user.
    """
    is_text = config.format == "text"
    template = "{text}" if is_text else config.prompt_template or ""
    found = _unread(file, {*field_names(template), config.label_key})
    if not found:
        return
    names, what = ", ".join(found), "data.format=text" if is_text else "data.prompt_template"
    if chosen:
        say(f"{file.path}: its rows have {names}, which {what} does not read")
        return
    if is_text:
        raise NemoKDError(
            f"{file.path}: its rows have {names} beside the text, which is all that is read of "
            "them; set data.format=text to read it alone, or remove the field from the file"
        )
    texts = "".join(f"{{{name}}}\\n" for name, value in found.items() if isinstance(value, str))
    how = f"set a template that reads it, such as data.prompt_template='{texts}{template}', or "
    if not texts:
        how = "a template reads only texts: write the rows as `messages`, or "
    raise NemoKDError(
        f"{file.path}: its rows have {names}, which the default data.prompt_template='{template}' "
        f"does not read; {how}remove the field from the file"
    )


def _unread(file: RowFile, read: set[str]) -> dict[str, Any]:
    """Return the unread fields of some rows with their first values, in the order of `FIELDS`."""
    found: dict[str, Any] = {}
    for number in spaced(len(file)):
        try:
            found = {**unread_fields(file[number], read), **found}
        except RowError:
            continue  # reported when the rows are checked
    return {name: found[name] for name in FIELDS if name in found}
