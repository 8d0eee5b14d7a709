"""Refuse to continue a Megatron checkpoint with other data or another loss.

Megatron-LM and Megatron-Bridge restore the number of consumed samples, not what they were samples
of: that is kept in a file beside their checkpoints.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from nemo_kd.data.resumed import (
    FILE,
    FILE_IS_MISSING,
    differing,
    loss_settings,
    refuse_changed,
    steps_changed,
)
from nemo_kd.files import canonical_json, decode_json, publish, read_json
from nemo_kd.loss import KDConfig
from nemo_kd.mcore.dataset import KDDataset
from nemo_kd.mcore.mix import STUDENT, changed
from nemo_kd.teacher.processes import Launch

STORE_ALPHA = "store_alpha"
"""Setting of that file: the alpha of each store that has its own."""
LATER = (STORE_ALPHA, STUDENT)
"""Settings of that file that files of earlier versions lack."""
STEPS = "training_steps"
"""Setting of that file: the number of steps that a schedule of the loss refers to; may change."""
LATEST = "latest_checkpointed_iteration.txt"
"""Megatron's file in a directory with a checkpoint."""


def keep_settings(
    data: KDDataset,
    config: KDConfig,
    *,
    save: str | Path | None,
    load: str | Path | None,
    allow: Collection[str] = (),
    more: Mapping[str, Any] | None = None,
    steps: int | None = None,
) -> None:
    """Compare data and loss with those of the checkpoints in `load`; write them into `save`.

    Each rank calls it, before or after the process groups start. `allow`: names that may differ,
    such as `seed`, `alpha` or `store_alpha`. `more`: further settings to compare, None where they
    are not used. `steps`: the number of training steps; a line says what another one does to a
    schedule. Checkpoints without the file are continued, and a line says so.

    Errors: NemoKDError, naming each difference.
    """
    loss = {**loss_settings(config), STORE_ALPHA: _store_alphas(data)}
    settings = decode_json(canonical_json({**data.identity, **loss, **(more or {})}))
    is_first = Launch.of(os.environ).rank == 0
    if load is not None and Path(load, LATEST).is_file():
        _compare(Path(load), settings, allow, is_first, steps)
    if save is not None and is_first:
        Path(save).mkdir(parents=True, exist_ok=True)
        publish(Path(save, FILE), canonical_json({**settings, STEPS: steps}))


def _store_alphas(data: KDDataset) -> list[float | None] | None:
    """Return each store's own alpha; None if all have that of the training."""
    own = [facts.alpha for facts in data.facts]
    alphas = [None if alpha is None else float(alpha) for alpha in own]
    return None if all(alpha is None for alpha in alphas) else alphas


def _compare(
    load: Path,
    settings: dict[str, Any],
    allow: Collection[str],
    is_first: bool,
    steps: int | None,
) -> None:
    if not (load / FILE).is_file():
        if is_first:
            print(FILE_IS_MISSING.format(load, FILE), flush=True)
        return
    then = read_json(load / FILE)
    names = differing(changed(then, settings), then, settings)
    refused = [name for name in names if name not in allow]
    for name in LATER:
        if name in refused and name not in then:
            refused.remove(name)
            if is_first:
                print(f"{load / FILE} has no {name}, so it was not compared", flush=True)
    remedy = f"save to and load from another directory, or allow {', '.join(refused)} to change"
    refuse_changed(load, refused, then, settings, remedy)
    before = then.get(STEPS)
    if is_first and steps is not None and before not in (None, steps):
        print(steps_changed(load, before, steps, settings), flush=True)
