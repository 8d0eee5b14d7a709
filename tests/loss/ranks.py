"""Processes that run checks in a gloo process group, so that each check can be a test of its own.

    with Ranks(4) as ranks:
        ranks.run(check_one)
        ranks.run(check_two)

Starting the processes takes seconds, a process group milliseconds: every check gets a new group,
and a check that fails on one rank ends on the others when that rank closes its connections.
"""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Check = Callable[[], None]
LIMIT = 300  # seconds, several times what the longest check takes


class Ranks:
    """A fixed number of processes that wait for checks."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._directory = tempfile.TemporaryDirectory()
        self._checks_run = 0
        self._start()

    def run(self, check: Check) -> None:
        """Run `check` on every rank; fail with the traceback of each rank on which it failed."""
        address = f"file://{self._directory.name}/{self._checks_run}"
        self._checks_run += 1
        for pipe in self._pipes:
            pipe.send((check, address))
        reports = [self._report(pipe) for pipe in self._pipes]
        failed = [f"rank {rank}: {report}" for rank, report in enumerate(reports) if report]
        if failed:
            self._stop()
            self._start()
            pytest.fail("\n".join(failed), pytrace=False)

    def close(self) -> None:
        self._stop()
        self._directory.cleanup()

    def _start(self) -> None:
        context: Any = mp.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(self.count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, self.count, theirs), daemon=True)
            process.start()
            theirs.close()  # a rank that dies is then seen as the end of its pipe
            self._pipes.append(ours)
            self._processes.append(process)

    def _stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def _report(self, pipe: Connection) -> str:
        """Empty if the rank's check passed."""
        try:
            return pipe.recv() if pipe.poll(LIMIT) else f"no answer after {LIMIT} s"
        except EOFError:
            return "the process died"

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _work(rank: int, count: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        check, address = pipe.recv()
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=count)
        dist.barrier()  # a check without collectives must not close what others still connect to
        try:
            check()
            report = ""
        except Exception:
            report = traceback.format_exc()
        finally:
            dist.destroy_process_group()
        pipe.send(report)


def check_name(check: Check) -> str:
    """`partial(check_topk, 7)` → `topk-7`, for the name of its test."""
    arguments = check.args if isinstance(check, partial) else ()
    function = check.func if isinstance(check, partial) else check
    name = getattr(function, "__name__", "").removeprefix("check_")
    return "-".join([name, *map(str, arguments)]).replace("torch.", "")
