"""Notice a training whose loss stays NaN or infinite."""

from __future__ import annotations

import math
from collections.abc import Callable

from nemo_kd.errors import NemoKDError

STEPS_NOT_FINITE = 5
"""Steps in a row with a loss that is NaN or infinite after which a training ends with an error. One
can be a batch at which float16 overflows."""
AT_THE_END = 2
"""The number that is enough if they are the last steps of a training."""


class FiniteWatch:
    """The last steps whose loss was not finite. `say` prints a line for the first of several."""

    def __init__(self, say: Callable[[str], None], remedy: str) -> None:
        self._say, self._remedy = say, remedy
        self._steps: list[int] = []

    def note(self, step: int, loss: float) -> None:
        """Note the loss of the next step."""
        if math.isfinite(loss):
            self._steps.clear()
            return
        self._steps.append(step)
        if len(self._steps) == 1:
            self._say(f"WARNING: the loss of step {step} is {loss}")

    def refuse(self, steps: int = STEPS_NOT_FINITE) -> None:
        """Raise NemoKDError if the last `steps` steps, or more, had no finite loss."""
        if len(self._steps) >= steps:
            raise NemoKDError(
                f"the loss is not finite from step {self._steps[0]} on, so the model is of no "
                f"use: {self._remedy}"
            )
