"""The open shards and segments of all stores of a process, within one budget of descriptors.

Python keeps a file descriptor for each memory map, so open files would otherwise grow with the
number of stores and segments until the process reaches `ulimit -n`.
"""

from __future__ import annotations

import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable
from itertools import count

from nemo_kd.store.shard import Shard

SHARE = 4
"""Open parts take at most one in four of the descriptors that a process may open."""
MOST_DESCRIPTORS = 8192
"""Linux allows 65,530 memory maps per process by default."""

Key = tuple[int, int]
"""Number of the store in this process, and index of the part."""


class OpenParts:
    """Least recently used parts; opening another one closes the oldest beyond the budget."""

    def __init__(self) -> None:
        self._parts: OrderedDict[Key, Shard] = OrderedDict()
        self._lock = threading.RLock()  # also taken when a store is garbage-collected
        self._stores = count()

    def __len__(self) -> int:
        return len(self._parts)

    def new_store(self) -> int:
        """Return a number for a store's keys."""
        return next(self._stores)

    def get(self, key: Key, opened: Callable[[], Shard]) -> Shard:
        """Return the part, opened if it is not open."""
        with self._lock:
            part = self._parts.get(key)
            if part is None:
                part = self._parts[key] = opened()
                self._close_oldest()
            self._parts.move_to_end(key)
            return part

    def close(self, store: int) -> None:
        """Close the parts of a store."""
        with self._lock:
            for key in [key for key in self._parts if key[0] == store]:
                del self._parts[key]

    def _close_oldest(self) -> None:
        soft_limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        budget = min(soft_limit // SHARE, MOST_DESCRIPTORS)
        used = sum(part.descriptors for part in self._parts.values())
        while used > budget and len(self._parts) > 1:
            _, oldest = self._parts.popitem(last=False)
            used -= oldest.descriptors

    def _after_fork(self) -> None:
        """Replace the lock, which another thread of the parent may have held at the fork."""
        self._lock = threading.RLock()


OPEN_PARTS = OpenParts()
"""Those of this process."""
os.register_at_fork(after_in_child=OPEN_PARTS._after_fork)
