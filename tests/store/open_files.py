"""Files of a store: how many are opened by opening it, stay open, and are read after a fork.

open_files.py opening STORE
open_files.py reading LIMIT STORE...
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
from collections.abc import Callable

from nemo_kd.store import Store
from nemo_kd.store.open_parts import OPEN_PARTS


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


def forking(directory: str) -> None:
    """Fork while another thread opens a part; prints the exit status of a child that reads."""
    store = Store(directory)
    with OPEN_PARTS._lock:
        reader = threading.Thread(target=lambda: store[0])
        thread = threading.Thread(target=fork_and_read, args=(store,))
        thread.start()
        thread.join()
        reader.start()
    reader.join()


def fork_and_read(store: Store) -> None:
    child = os.fork()  # while the main thread holds the lock
    if not child:
        signal.alarm(60)
        os._exit(len(store[0].input_ids) == 0)
    _, status = os.waitpid(child, 0)
    print(status)


if __name__ == "__main__":
    names: dict[str, Callable[..., None]] = {
        "opening": opening,
        "reading": reading,
        "forking": forking,
    }
    names[sys.argv[1]](*sys.argv[2:])
