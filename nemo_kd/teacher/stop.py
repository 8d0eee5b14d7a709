"""Stop a dump after the current shard on SIGTERM or SIGUSR1 (SLURM's early warning)."""

from __future__ import annotations

import signal
from types import FrameType

from nemo_kd.teacher.layout import Layout

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopOnSignal:
    """Context manager that records SIGTERM and SIGUSR1 instead of ending the process.

    The ranks of a replica must agree when to stop; otherwise one would wait forever in a collective
    of the next forward pass. They agree after each shard, the smallest unit that is kept.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.received = self.stopped = False

    def __enter__(self) -> StopOnSignal:
        self._previous = {name: signal.signal(name, self._receive) for name in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for name, handler in self._previous.items():
            signal.signal(name, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def agreed_in_replica(self) -> bool:
        """Return whether any rank of this replica received a signal; collective over its ranks."""
        # `received` is never reset, so a signal during the collective takes effect at the next one.
        self.stopped = self.layout.any_in_replica(self.received or self.stopped)
        return self.stopped

    def agreed(self) -> bool:
        """Return whether any rank of the job was stopped; collective over all ranks."""
        return self.layout.any(self.received or self.stopped)
