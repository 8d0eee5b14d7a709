"""For mkdocs: a star in a docstring, as in [*, Vp], is a star and no emphasis."""

from __future__ import annotations

import re
from typing import Any

import griffe


class PlainStars(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **others: Any) -> None:
        if obj.docstring:
            parts = re.split(r"(`[^`]*`)", obj.docstring.value)
            parts[::2] = [part.replace("*", r"\*") for part in parts[::2]]
            obj.docstring.value = "".join(parts)
