"""A loss whose weight and temperature change over the training."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Self

from nemo_kd.errors import NemoKDError
from nemo_kd.loss.config import KDConfig, check_alpha, check_temperature
from nemo_kd.loss.names import check_name

SCHEDULES = ("linear", "cosine")


@dataclass(frozen=True)
class KDSchedule(KDConfig):
    """`KDConfig` whose `alpha` and `temperature` may move to another value."""

    alpha_end: float | None = None
    """Value of `alpha` at the end of the schedule; None: `alpha` is constant."""
    temperature_end: float | None = None
    """Value of `temperature` at the end of the schedule; None: `temperature` is constant. Not with
    support `bucket`, which needs the teacher's log-sum-exp at every temperature."""
    schedule: str = "linear"
    """Shape of the schedule: `linear`, or `cosine` (half a period: slow at both ends)."""
    schedule_steps: int | None = None
    """Steps until the end of the schedule; None: the number of training steps
    (`trainer.max_steps` in NeMo)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("schedule", self.schedule, SCHEDULES, {"linear": "lin", "cosine": "cos"})
        if self.alpha_end is not None and (self.sft_weight, self.kd_weight) != (None, None):
            raise NemoKDError(
                "alpha_end schedules alpha; use alpha instead of sft_weight and kd_weight"
            )
        if self.temperature_end not in (None, self.temperature) and self.support == "bucket":
            raise NemoKDError(
                "temperature_end needs support topk or vocab: support bucket needs the teacher's "
                "log-sum-exp at every temperature on the way"
            )
        if self.schedule_steps is not None and self.schedule_steps < 1:
            raise NemoKDError(
                f"schedule_steps is {self.schedule_steps}: expected at least 1, or null for the "
                "number of training steps"
            )
        if self.scheduled:
            check_alpha("alpha_end", self.alpha_end)
            check_temperature("temperature_end", self.temperature_end)
            _ = self.end  # checks the rest of the final values
            return
        for name, default in (("schedule", KDSchedule.schedule), ("schedule_steps", None)):
            value = getattr(self, name)
            if value != default:
                raise NemoKDError(
                    f"{name} is {value!r}, but neither alpha nor temperature changes: set "
                    f"alpha_end or temperature_end, or remove {name}"
                )

    @property
    def scheduled(self) -> bool:
        """Whether any setting changes from step to step."""
        return self.alpha_end is not None or self.temperature_end is not None

    @property
    def distils(self) -> bool:
        """Whether the divergence has a weight above 0 at any step."""
        return self.weights[1] > 0 or bool(self.alpha_end)

    @property
    def end(self) -> Self:
        """The constant settings at the end of the schedule."""
        return self.at(self.schedule_steps or 1, 1)

    def at(self, step: int, max_steps: int) -> Self:
        """Return the constant settings of one step.

        The first step is 0; the schedule ends at step `schedule_steps`, or `max_steps` if it is
        None.
        """
        if not self.scheduled:
            return self
        part = min(step / (self.schedule_steps or max(max_steps, 1)), 1.0)
        if self.schedule == "cosine":
            part = (1 - math.cos(math.pi * part)) / 2

        def between(start: float, end: float | None) -> float:
            return start if end is None else start + part * (end - start)

        alpha = None if self.alpha_end is None else between(self.weights[1], self.alpha_end)
        return dataclasses.replace(
            self,
            alpha=self.alpha if alpha is None else alpha,
            temperature=between(self.temperature, self.temperature_end),
            alpha_end=None,
            temperature_end=None,
            schedule=KDSchedule.schedule,
            schedule_steps=None,
        )


def training_config(config: KDConfig, step: int, max_steps: int) -> KDConfig:
    """Return the constant settings of a training step; the first one is 0."""
    return config.at(step, max_steps) if isinstance(config, KDSchedule) else config


def evaluation_config(config: KDConfig) -> KDConfig:
    """Return the settings of evaluations, the schedule's end: values are comparable in a run."""
    return config.end if isinstance(config, KDSchedule) else config


def refuse_scheduled(config: KDConfig) -> None:
    """Raise NemoKDError for settings that change from step to step."""
    if isinstance(config, KDSchedule) and config.scheduled:
        name = "temperature_end" if config.alpha_end is None else "alpha_end"
        raise NemoKDError(
            f"the loss got a config with {name}={getattr(config, name)}, but not the step: pass "
            "config=config.at(step, max_steps)"
        )
