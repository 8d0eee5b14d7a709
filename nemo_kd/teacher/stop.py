"""Stopping a long dump in good order: SIGTERM, or SIGUSR1 as SLURM's warning before its limit."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

import torch
from megatron.core import parallel_state

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopOnSignal:
    """Within it a signal does not end the process: the ranks of a replica stop after their shard.

    A shard is the least that can be kept. Ranks of one replica must agree, or one would wait for
    ever in a collective of the next forward pass; so they ask one another after each shard.
    """

    def __init__(self) -> None:
        self.received = self.stopped = False

    def __enter__(self) -> StopOnSignal:
        self._previous = {name: signal.signal(name, self._receive) for name in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name, handler in self._previous.items():
            signal.signal(name, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def agreed(self, group: torch.distributed.ProcessGroup | None = None) -> bool:
        """Whether any rank of `group` has a signal; every rank of it asks. Default: the replica."""
        flag = torch.tensor(
            [float(self.received or self.stopped)], device=torch.cuda.current_device()
        )
        group = parallel_state.get_model_parallel_group() if group is None else group
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX, group=group)
        # `received` is only ever set: a signal that comes during the collective is for the next.
        self.stopped = self.stopped or bool(flag.item())
        return self.stopped
