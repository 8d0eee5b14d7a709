"""Compare a resumed training with the settings that are kept with its checkpoint."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_kd.errors import NemoKDError
from nemo_kd.loss import KDConfig, KDSchedule

FILE = "nemo_kd.json"
"""File beside or in a checkpoint, with the settings of its training."""
FILE_IS_MISSING = "{} has no {}, so data and loss were not compared with it"
WEIGHTS = ("alpha", "sft_weight", "kd_weight")
"""Settings of the loss that express the same two weights in different ways."""


def loss_settings(config: KDConfig) -> dict[str, Any]:
    """Return the settings of the loss, the same names for a constant one and a schedule."""
    return asdict(KDSchedule(**asdict(config)))


def differing(names: Collection[str], then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return `names` without those of weights that are only spelt differently."""
    spelt = [name for name in names if name in WEIGHTS]
    same = bool(spelt) and same_weights(_weights(then), _weights(now))
    return [name for name in names if not (same and name in spelt)]


def same_weights(then: tuple[float, float], now: tuple[float, float]) -> bool:
    """Whether two pairs of weights are equal up to rounding: 1 - 0.9 is not 0.1."""
    return all(math.isclose(*pair, abs_tol=1e-12) for pair in zip(then, now, strict=True))


def _weights(settings: Mapping[str, Any]) -> tuple[float, float]:
    given: dict[str, Any] = {name: settings.get(name) for name in WEIGHTS}
    return KDConfig(**given).weights


def steps_changed(
    checkpoint: Path, then: int, now: int, settings: Mapping[str, Any], others: Collection[str] = ()
) -> str:
    """Return a line on a changed number of training steps, and what it does to schedules.

    `settings`: those of the loss. `others`: schedules beside the loss's that refer to the number.
    """
    ends = ("alpha_end", "temperature_end")
    own = [f"{name}={settings[name]}" for name in ends if settings.get(name) is not None]
    if own and settings.get("schedule_steps") is None:
        others = [*others, f"the loss's schedule ({', '.join(own)})"]
    effect = f": {' and '.join(others)} may jump to that of {now} steps" if others else ""
    return f"{checkpoint} is of a run of {then} steps, and this one has {now}{effect}"


def refuse_changed(
    checkpoint: Path,
    names: Collection[str],
    then: Mapping[str, Any],
    now: Mapping[str, Any],
    remedy: str,
) -> None:
    """Raise NemoKDError for settings `names` that changed, with both values of each."""
    if not names:
        return
    named = "; ".join(
        f"{name}: {_shown(then.get(name))} in the checkpoint, {_shown(now[name])} now"
        for name in names
    )
    raise NemoKDError(
        f"{checkpoint} belongs to a run with other settings: {named}. Restore them, {remedy}"
    )


def _shown(value: Any) -> str:
    if isinstance(value, dict) and {"path", "fingerprint"} <= value.keys():
        return f"{value['path']} (fingerprint {value['fingerprint'][:12]})"
    return str(value)
