"""Fit `model.optim` to the chosen optimizer and schedule, to which NeMo passes every key.

The YAML has keys of its own choice, Adam with a cosine schedule. Another class takes others.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Collection, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_kd.errors import NemoKDError
from nemo_kd.nemo.settings.optim import (
    MCORE,
    optimizer_parameters,
    optimizers,
    sched_keys,
    schedulers,
)

OPTIM_DEFAULTS: dict[str, Any] = {"weight_decay": 0.01, "betas": [0.9, 0.98]}
SCHED_DEFAULTS: dict[str, Any] = {
    **{"warmup_steps": 50, "warmup_ratio": None, "constant_steps": 0, "constant_ratio": None},
    "min_lr": 0.0,
}
"""The keys of the YAML, and the ratios that may be given instead of steps, with their defaults."""
OTHER_BETAS = ("adan",)
"""Optimizers with three betas: the default's two are not theirs."""
SAVED = ("fused_adam", "megatron_fused_adam", "distributed_fused_adam", MCORE, "adamw", "sgd")
"""Optimizers whose state NeMo can write to Megatron's checkpoints and read from them again."""
REQUIRED = {"NoamAnnealing": ["d_model"], "T5InverseSquareRootAnnealing": ["constant_steps"]}
"""Keys without which NeMo's schedules fail; those of torch's have no default in their signature."""
SCHED = "model.optim.sched"


def fit_optim(model: DictConfig) -> None:
    """Remove the defaults that the optimizer or the schedule of `model.optim` does not take.

    A given ratio replaces the default number of steps. Without a schedule, or with one without a
    name, the learning rate is constant, and `sched` is removed.

    Errors: NemoKDError for another value of a key that the class does not take, for a ratio beside
    a number of steps, and for a key that the class needs.
    """
    block = model.get("optim")
    if not isinstance(block, DictConfig):
        return
    name = str(block.get("name", "adam"))
    if name in optimizers() and "args" not in block:
        taken = set(optimizer_parameters(name))
        if name in OTHER_BETAS and _is(block.get("betas"), OPTIM_DEFAULTS["betas"]):
            taken.discard("betas")
        _drop_defaults(block, "model.optim", name, taken, OPTIM_DEFAULTS)
    if name == "adafactor" and block.get("relative_step") is not False:
        raise NemoKDError(
            "model.optim.name=adafactor computes its own rates instead of model.optim.lr: set "
            "model.optim.relative_step=false"
        )
    _fit_schedule(block)


def check_saved(cfg: DictConfig) -> None:
    """Refuse an optimizer whose state cannot be saved, in a run with checkpoints.

    Megatron's checkpoints hold tensors of the parameters' shapes, and NeMo prepares only Adam's
    two to be read: others fail at the first checkpoint, or when the run is resumed.

    Errors: NemoKDError.
    """
    manager = cfg.get("exp_manager")
    if manager is None or manager.get("create_checkpoint_callback") is False:
        return
    block = cfg.model.optim
    name, momentum = str(block.get("name", "adam")), block.get("momentum")
    if name not in SAVED or (name == "sgd" and momentum):
        given = f"name={name}" if name not in SAVED else f"momentum={momentum}"
        raise NemoKDError(
            f"model.optim.{given}: NeMo cannot keep its state in a checkpoint. Choose "
            f"model.optim.name={' | '.join(SAVED[:-1])} (or sgd without momentum), or, for a run "
            "that saves nothing, exp_manager.create_checkpoint_callback=false"
        )


def _fit_schedule(block: DictConfig) -> None:
    sched = block.get("sched")
    if sched is not None and not isinstance(sched, DictConfig):
        return  # refused as no block
    if sched is None or sched.get("name") is None:
        for key, value in [(str(key), value) for key, value in (sched or {}).items()]:
            if value is not None and not _is(value, SCHED_DEFAULTS.get(key)):
                raise NemoKDError(
                    f"{SCHED}.{key}={value} has no effect without a schedule: set {SCHED}.name, or "
                    "remove it"
                )
        block.pop("sched", None)
        return
    name = str(sched.name)
    if name not in schedulers() or "args" in sched:
        return
    _prefer_ratios(sched)
    _drop_defaults(sched, SCHED, name, set(sched_keys(sched)), SCHED_DEFAULTS)
    for key in _required(name):
        if sched.get(key) in (None, SCHED_DEFAULTS.get(key)):
            raise NemoKDError(f"{SCHED}.name={name} needs {SCHED}.{key}: set it")


def _prefer_ratios(sched: DictConfig) -> None:
    """Remove the number of steps where a ratio is given: NeMo takes one of both."""
    for ratio in [str(key) for key in sched if str(key).endswith("_ratio")]:
        steps = ratio.replace("_ratio", "_steps")
        if sched[ratio] is None or sched.get(steps) is None:
            continue
        if sched[steps] != SCHED_DEFAULTS.get(steps):
            raise NemoKDError(
                f"{SCHED}.{ratio}={sched[ratio]} and {SCHED}.{steps}={sched[steps]} are both "
                "given: remove one of them"
            )
        del sched[steps]


def _drop_defaults(
    block: DictConfig, where: str, name: str, taken: Collection[str], defaults: Mapping[str, Any]
) -> None:
    for key, default in defaults.items():
        if key not in block or key in taken:
            continue
        if block[key] is not None and not _is(block[key], default):
            raise NemoKDError(
                f"{where}.{key}={block[key]}: {name} does not take it. Remove it, or choose "
                f"another {where}.name. {name} takes {', '.join(sorted(taken))}"
            )
        del block[key]


def _required(name: str) -> list[str]:
    cls = schedulers()[name]
    if not cls.startswith("pt_scheduler."):
        return REQUIRED.get(name, [])
    found = getattr(importlib.import_module("torch.optim.lr_scheduler"), cls.split(".")[1])
    parameters = inspect.signature(found).parameters.values()
    return [one.name for one in parameters if one.default is one.empty and one.name != "optimizer"]


def _is(value: Any, default: Any) -> bool:
    return bool((list(value) if OmegaConf.is_list(value) else value) == default)
