"""Refuse to continue a Megatron checkpoint with other data or another loss.

Megatron-LM and Megatron-Bridge restore the number of consumed samples, not what they were samples
of: that is kept in a file beside their checkpoints. It is written when a training starts, which may
end before it saves: until then it also has the settings of the checkpoint that was there.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from nemo_kd.checkpoints.latest import RELEASE, latest
from nemo_kd.data.resumed import (
    FILE,
    FILE_IS_MISSING,
    differing,
    loss_settings,
    refuse_changed,
    steps_changed,
)
from nemo_kd.errors import NemoKDError
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
BEFORE = "before"
"""Key of that file: the settings of the checkpoint that was there when the training started.

`{"iteration": TEXT, "settings": {...}}`: those of the checkpoint as long as it is the latest, null
where they are not known.
"""


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
    """Compare data and loss with those of the checkpoint in `load`; write them into `save`.

    Each rank calls it, before or after the process groups start. `allow`: names that may differ,
    such as `seed`, `alpha` or `store_alpha`. `more`: further settings to compare, None where they
    are not used. `steps`: the number of training steps; a line says what another one does to a
    schedule. Checkpoints without the file are continued, and a line says so.

    Errors: NemoKDError, naming each difference; also for a `save` that has checkpoints of a
    training that this one does not continue.
    """
    loss = {**loss_settings(config), STORE_ALPHA: _store_alphas(data)}
    settings = decode_json(canonical_json({**data.identity, **loss, **(more or {})}))
    is_first = Launch.of(os.environ).rank == 0
    if load is not None and latest(Path(load)) is not None:
        _compare(Path(load), settings, allow, is_first, steps)
    if save is None:
        return
    _refuse_others(Path(save), load)
    if is_first:
        _write(Path(save), {**settings, STEPS: steps})


def _kept(directory: Path) -> dict[str, Any] | None:
    """Return the settings of the latest checkpoint; None if they are not known."""
    file = directory / FILE
    if not file.is_file():
        return None
    kept: dict[str, Any] = read_json(file)
    before = kept.pop(BEFORE, None)
    if before is None or before["iteration"] != latest(directory):
        return kept
    settings: dict[str, Any] | None = before["settings"]  # nothing was saved since
    return settings


def _write(directory: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a start, beside those of the checkpoint that it continues."""
    directory.mkdir(parents=True, exist_ok=True)
    iteration, kept, before = latest(directory), _kept(directory), {}
    if iteration is not None and kept != settings:
        before = {BEFORE: {"iteration": iteration, "settings": kept}}
    publish(directory / FILE, canonical_json({**settings, **before}))


def _refuse_others(save: Path, load: str | Path | None) -> None:
    """Raise NemoKDError if `save` has checkpoints and is not what is loaded.

    Otherwise they would count as this training's, and the next start would continue them as such.
    """
    iteration = latest(save)
    if iteration in (None, "0", RELEASE) or (load is not None and _is_same(save, Path(load))):
        return
    raise NemoKDError(
        f"{save} has iteration {iteration} of an earlier training, which this start does not "
        "continue: load it, and not as the start of a new training (finetune), or save to another "
        "directory"
    )


def _is_same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


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
    then = _kept(load)
    if then is None:
        what = (
            f"settings of iteration {latest(load)} in {FILE}" if (load / FILE).is_file() else FILE
        )
        if is_first:
            print(FILE_IS_MISSING.format(load, what), flush=True)
        return
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
