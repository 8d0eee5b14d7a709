"""Compare a resumed training with the settings that are kept with its checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_kd.errors import NemoKDError
from nemo_kd.loss import KDConfig, KDSchedule

FILE = "nemo_kd.json"
"""File beside or in a checkpoint, with the settings of its training."""
FILE_IS_MISSING = "{} has no {}, so data and loss were not compared with it"


def loss_settings(config: KDConfig) -> dict[str, Any]:
    """Return the settings of the loss, the same names for a constant one and a schedule."""
    return asdict(KDSchedule(**asdict(config)))


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
