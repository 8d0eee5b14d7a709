"""Record a run in its checkpoints: settings, data, student and progress."""

from __future__ import annotations

import dataclasses
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_kd.checkpoints.card import STEPS, STORES
from nemo_kd.checkpoints.distributed import COMMON
from nemo_kd.checkpoints.source import unpickles
from nemo_kd.errors import NemoKDError
from nemo_kd.nemo.config import kd_training_config
from nemo_kd.nemo.resumed_settings import Settings
from nemo_kd.nemo.splits import TrainSplit
from nemo_kd.sft import open_files
from nemo_kd.sft.chat_template import resolved_template
from nemo_kd.sft.config import template_hash
from nemo_kd.store import Store
from nemo_kd.store.fingerprint import checkpoint_fingerprint

CHECKPOINT_KEY = "nemo_kd"
STOPPED_EARLY = "stopped_early"
VALIDATED, METRICS = "validated", "metrics"
DATA_KEY, STEPS_KEY = STORES, STEPS
"""Keys of the model's configuration in which a `.nemo` records its own training."""
Origin = dict[str, str]
"""`path` and `fingerprint` of a file or directory."""


@dataclass(frozen=True)
class Progress:
    """Number of steps and samples that a run has trained."""

    step: int = 0
    consumed_samples: int = 0
    stopped_early: str = ""
    """Why early stopping ended the run; "" if it did not."""
    validated: bool = True
    """Whether a validation of this step was run before the checkpoint was saved, if one was due."""


@dataclass(frozen=True)
class Record:
    """Facts about a run in each of its checkpoints; None: missing in an older checkpoint."""

    train_stores: list[Origin] | None = None
    """Stores and SFT files of the training, in order, with fingerprints of their bytes."""
    kd: dict[str, Any] | None = None
    settings: Settings | None = None
    """The complete configuration as given, with interpolations resolved."""
    student: Origin | None = None
    """The student before training, `model.restore_from_path`."""
    adapters: Origin | None = None
    """The adapters before training, `model.peft.restore_from_path`."""
    max_steps: int | None = None
    """Steps of the run, with epochs converted to steps."""
    chat_template: Origin | None = None
    """The file that `model.data.train_ds.chat_template` names, if it names one."""


def asked(cfg: DictConfig) -> Settings:
    """Return the configuration, interpolations resolved, before its adaptation to the machine."""
    container: Any = OmegaConf.to_container(cfg, resolve=True)
    return container


def record_of(cfg: DictConfig, settings: Settings) -> Record:
    """Make the record of a run; `cfg` has its final length, `settings` are those of `asked`."""
    adapters = (cfg.model.get("peft") or {}).get("restore_from_path")
    return Record(
        train_stores=training_data(cfg.model.data.train_ds),
        kd=dataclasses.asdict(kd_training_config(cfg.model.kd)),
        settings=settings,
        student=_checkpoint(cfg.model.restore_from_path),
        adapters=_checkpoint(adapters) if adapters else None,
        max_steps=cfg.trainer.max_steps,
        chat_template=template_file(cfg.model.data.train_ds.get("chat_template")),
    )


def training_data(data_cfg: DictConfig) -> list[Origin]:
    """Return paths and fingerprints of the training data, stores first."""
    split = TrainSplit.of(data_cfg)
    stores = [Store(directory) for directory in split.store]
    return [
        *({"path": str(s.origin), "fingerprint": s.fingerprint} for s in stores),
        *({"path": str(Path(f)), "fingerprint": open_files(f).sha256} for f in split.file_names),
    ]


def _checkpoint(path: str) -> Origin:
    return {"path": str(path), "fingerprint": checkpoint_fingerprint(Path(path))}


def template_file(given: str | None) -> Origin | None:
    """Return path and fingerprint of a file with a chat template; None for the text of one."""
    text = None if given is None else resolved_template(given)
    if text is None or text == given:
        return None
    return {"path": str(given), "fingerprint": template_hash(text)}


def read(checkpoint: str) -> tuple[Progress, Record]:
    """Read progress and record of a checkpoint; its path is the one NeMo gives the trainer."""
    kept = _without_weights(Path(checkpoint))
    mine = kept.get(CHECKPOINT_KEY) or {}
    step = int(kept["global_step"])
    consumed = mine.get("consumed_samples", _named(checkpoint, "consumed_samples"))
    names = {field.name for field in dataclasses.fields(Record)}
    record = Record(**{name: value for name, value in mine.items() if name in names})
    stopped = mine.get(STOPPED_EARLY, _out_of_patience(kept.get("callbacks") or {}))
    validated = bool(mine.get(VALIDATED, True))  # missing in an older checkpoint
    return Progress(step, int(consumed), stopped, validated), record


def _out_of_patience(callbacks: dict[str, Any]) -> str:
    """Return why early stopping ended the run of an older checkpoint, from Lightning's state."""
    for name, state in callbacks.items():
        if name.startswith("EarlyStopping") and 0 < state["wait_count"] >= state["patience"]:
            return f"no improvement in the last {state['wait_count']} validations"
    return ""


def _without_weights(path: Path) -> dict[str, Any]:
    """Load a checkpoint without its tensors, from Megatron's directory or Lightning's file.

    Only OmegaConf's configurations are unpickled, besides torch's own values and plain ones.
    """
    import torch

    if path.is_dir():
        file = path / COMMON
    elif path.is_file():
        file = path
    else:  # of adapters, model-parallel: one file for each rank, in `mp_rank_00` and so on
        file = next(iter(sorted(path.parent.glob(f"*_rank_*/{path.name}"))))
    try:
        with unpickles():
            return dict(torch.load(file, map_location="cpu", mmap=True, weights_only=True))
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise NemoKDError(
            f"{file}: its pickle holds more than a training writes ({reason}); if you trust it, "
            "set TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1"
        ) from error


def _named(checkpoint: str, what: str) -> float:
    """Parse the number after `what` in a checkpoint's name as NeMo does; 0 if there is none."""
    found = re.search(rf"{what}=(\d+(\.\d+)?)", Path(checkpoint).name)
    return float(found[1]) if found else 0
