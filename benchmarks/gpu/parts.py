"""One part of `make gpu` in a process of its own: `python -m benchmarks.gpu.parts NAME [tiny]`.

It prints a line of JSON after `ROW` for each result. `tiny`: small sizes on the CPU, for tests.
"""

from __future__ import annotations

import json
import sys
import warnings
from importlib import import_module

PARTS = {
    "machine": (30, "machine"),
    "correct": (150, "suite"),
    "loss": (120, "candidates"),
    "student": (70, "student"),
    "dump": (40, "teacher"),
    "head": (30, "candidates"),
    "topk": (15, "candidates"),
    "tests": (50, "suite"),
    "sanitizer": (40, "suite"),
    "nemo": (200, "nemo"),
}
"""{name: (most seconds, module)}, the most valuable results first.

The module's function has the part's name, or is `rows`."""
ROW = "ROW "


def main(name: str, tiny: bool) -> None:
    from benchmarks.gpu.sizes import GPU, TINY

    warnings.filterwarnings("ignore")
    module = import_module(f"benchmarks.gpu.{PARTS[name][1]}")
    function = getattr(module, name, None) or module.rows
    for row in function(TINY if tiny else GPU):
        print(ROW + json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] == ["tiny"])
