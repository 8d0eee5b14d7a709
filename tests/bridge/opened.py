"""Run a program, and print a line for each store, SFT file and tokenizer that it opens.

    python tests/bridge/run.py tests/bridge/opened.py examples/bridge/train.py student/ …

Tokenizers that Bridge loads itself are not among them.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

from nemo_kd.sft import JsonlFile
from nemo_kd.sft.tokenizer import HFTokenizer
from nemo_kd.store import Store


def counted(found: type[Any]) -> None:
    """Print a line at each construction."""
    begin = found.__init__

    def init(self: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        print(f"opened {found.__name__} {path}", flush=True)
        begin(self, path, *args, **kwargs)

    found.__init__ = init


if __name__ == "__main__":
    for each in (Store, JsonlFile, HFTokenizer):
        counted(each)
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
