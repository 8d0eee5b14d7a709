"""Print text from files safely: control characters appear as escapes and act on no terminal."""

from __future__ import annotations

import os
import re
import sys

_UNSAFE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 except tab and newline, DEL, C1: start escape sequences
    r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # reorder the text around them
    r"\u2028\u2029\ufff9-\ufffb"  # break lines, annotate
    r"\ud800-\udfff]"  # lone surrogates, which no encoding can write
)


def visible(text: str) -> str:
    r"""Replace characters that control a terminal or reorder text by `\u001b`, `\u202e` and so on.

    Newlines and tabs are kept. The escapes are JSON's: JSON text keeps its value.
    """
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def say(text: str) -> None:
    """Print a line on standard error, from the first process of torchrun or srun."""
    if int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0:
        print(visible(text), file=sys.stderr, flush=True)
