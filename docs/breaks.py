"""For mkdocs: where a key or a path in the text may break, so that no word in it does."""

from __future__ import annotations

import re
from typing import Any

# Blocks of code come after an empty <span>; what is highlighted has tags within.
INLINE = re.compile(r"(?<!</span>)<code>([^<]+)</code>")
AFTER = re.compile(r"(?<=[\w}\])])([./=:,])(?=[\w${\[(])")
LONG_WORD = re.compile(r"\w{20,}")  # `concat_sampling_probabilities`, in a table on a telephone


def on_page_content(html: str, **others: Any) -> str:
    """Mark each place after `.`, `/`, `=`, `:` and `,` in inline code as a possible break."""
    return INLINE.sub(_marked, html)


def _marked(code: re.Match[str]) -> str:
    text = LONG_WORD.sub(lambda word: word[0].replace("_", "_<wbr>"), code[1])
    return "<code>" + AFTER.sub(r"\1<wbr>", text) + "</code>"
