"""Stop a long dump after the current shard: on SIGTERM, or on SIGUSR1, SLURM's early warning."""

from __future__ import annotations

import signal
from types import FrameType

from nemo_kd.teacher.layout import Layout

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopOnSignal:
    """While it is open, a signal does not end the process but is recorded.

    The ranks of a replica have to agree when to stop, or one would wait forever in a collective of
    the next forward pass: they ask one another after each shard, the smallest unit that is kept.
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
        """Whether a rank of this replica has received a signal; all of its ranks ask."""
        # Only ever set, so a signal during the collective counts the next time.
        self.stopped = self.layout.any_in_replica(self.received or self.stopped)
        return self.stopped

    def agreed(self) -> bool:
        """Whether any rank of the job stopped; all ranks ask."""
        return self.layout.any(self.received or self.stopped)
