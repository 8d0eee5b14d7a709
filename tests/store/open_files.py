"""How many files of a store are opened by opening it, and stay open when stores are read in turn.

open_files.py opening STORE
open_files.py reading LIMIT STORE...
"""

from __future__ import annotations

import os
import resource
import sys

from nemo_kd.store import Store


def opening(directory: str) -> None:
    found: list[str] = []
    sys.addaudithook(lambda name, args: found.append(str(args[0])) if name == "open" else None)
    Store(directory)
    print(sum(directory in path for path in found))


def reading(limit: str, *directories: str) -> None:
    """Under a limit of open files; prints those that are open, and the last row of each store."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(limit), int(limit)))
    stores = [Store(directory) for directory in directories]
    rows = [[store[i].row for store in stores] for i in range(len(stores[0]))]
    print(len(os.listdir("/proc/self/fd")), rows[-1])


if __name__ == "__main__":
    opening(*sys.argv[2:]) if sys.argv[1] == "opening" else reading(*sys.argv[2:])
