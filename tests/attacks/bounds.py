"""Limits of time and memory for a piece of code that reads a hostile file."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SECONDS, WAIT, MEMORY = 2.0, 30.0, 1 << 30
"""CPU time, time on the clock (of a read that waits, on a busy machine), bytes."""


class Exceeded(BaseException):
    """The code took more time than allowed; no `except Exception` hides it."""


@contextmanager
def bounded(seconds: float = SECONDS) -> Iterator[None]:
    """Raise Exceeded after `seconds` of CPU time, or WAIT; MemoryError beyond another MEMORY."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Exceeded(f"more than {seconds} s of CPU time, or waiting")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handlers = [(kind, signal.signal(kind, stop)) for kind in (signal.SIGPROF, signal.SIGALRM)]
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, WAIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        for kind, handler in handlers:
            signal.signal(kind, handler)
