"""Run a function over many tasks in several processes, with the results in the tasks' order."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from nemo_kd.errors import StoreError

Task = TypeVar("Task")
Result = TypeVar("Result")
SMALL = 1 << 28  # bytes
AHEAD = 3
"""Tasks per process that are submitted before the first result is taken; more would take memory."""


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def processes(jobs: int, octets: int) -> int:
    """Return the number of processes for a job over this many bytes; `jobs` = 0 chooses it.

    Starting processes takes about a second, so that a small store is read by this one.
    """
    return jobs or (cores() if octets > SMALL else 1)


def ordered(
    function: Callable[[Task], Result], tasks: Iterable[Task], jobs: int
) -> Iterator[Result]:
    """Yield `function(task)` for each task, in order, computed by `jobs` processes.

    With one job the tasks run in this process. Otherwise function, tasks and results are pickled,
    and the processes are new ones: a program that calls this at its top level needs
    `if __name__ == "__main__"`.
    """
    if jobs <= 1:
        yield from map(function, tasks)
        return
    # Not forked: the caller may have threads, of torch for example.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        pending: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                pending.append(pool.submit(function, task))
                if len(pending) >= AHEAD * jobs:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise StoreError(
                "a process that read or wrote the store has ended, perhaps for lack of memory; use "
                "fewer with --jobs"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
