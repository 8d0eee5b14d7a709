"""Every optimizer and schedule of NeMo starts with the keys of the default configuration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from nemo_kd.errors import NemoKDError
from nemo_kd.nemo.settings.chosen import OPTIM_DEFAULTS, SAVED, SCHED_DEFAULTS, check_saved
from nemo_kd.nemo.settings.optim import APEX, MCORE, optimizers, schedulers
from tests.settings.test_keys import TRAIN, check, configuration, refusal

OPTIM, SCHED = "model.optim", "model.optim.sched"
NEEDED = {
    "NoamAnnealing": ["d_model=16"],
    "T5InverseSquareRootAnnealing": ["constant_steps=3"],
    "StepLR": ["step_size=3"],
    "ExponentialLR": ["gamma=0.9"],
    "CyclicLR": ["base_lr=0.1", "max_lr=0.2"],
}
"""What a schedule needs beside the default keys."""


def optim_of(*overrides: str) -> dict[str, Any]:
    """`model.optim` as the training gives it to NeMo."""
    found: Any = OmegaConf.to_container(check(TRAIN, *overrides).model.optim, resolve=True)
    return dict(found)


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(2))


def test_the_defaults_are_those_of_the_yaml() -> None:
    given: Any = OmegaConf.to_container(configuration(TRAIN).model.optim)
    sched = given.pop("sched")
    assert given == {"name": "fused_adam", "lr": 1e-4, **OPTIM_DEFAULTS}
    defaults = {key: value for key, value in SCHED_DEFAULTS.items() if value is not None}
    assert sched == {"name": "CosineAnnealing", **defaults}


@pytest.mark.parametrize("name", sorted({*APEX, MCORE, "adam", "adamw"}))
def test_optimizers_like_the_default_keep_its_keys(name: str) -> None:
    given = optim_of(f"{OPTIM}.name={name}")
    assert OPTIM_DEFAULTS.items() <= given.items()
    assert given["sched"]["constant_steps"] == 0


@pytest.mark.parametrize(
    ("overrides", "given"),
    [
        *((["adam"], "name=adam"), (["rprop"], "name=rprop"), (["novograd"], "name=novograd")),
        (["adafactor", f"{OPTIM}.relative_step=false"], "name=adafactor"),
        (["sgd", f"{OPTIM}.momentum=0.9"], "momentum=0.9"),
    ],
)
def test_an_optimizer_that_could_not_be_saved_is_refused(overrides: list[str], given: str) -> None:
    """Otherwise hours of training would end in a traceback at the first checkpoint."""
    overrides = [f"{OPTIM}.name={overrides[0]}", *overrides[1:]]
    with pytest.raises(NemoKDError, match=rf"^model.optim.{given}: NeMo cannot keep its state"):
        check_saved(check(TRAIN, *overrides))
    check_saved(check(TRAIN, *overrides, "exp_manager.create_checkpoint_callback=false"))
    check_saved(check(TRAIN, *overrides, "exp_manager=null"))


@pytest.mark.parametrize("name", SAVED)
def test_one_that_can_be_saved_is_not(name: str) -> None:
    check_saved(check(TRAIN, f"{OPTIM}.name={name}"))


@pytest.mark.nemo
def test_every_optimizer_is_built_with_the_default_keys() -> None:
    from nemo.core.optim.optimizers import AVAILABLE_OPTIMIZERS

    assert set(AVAILABLE_OPTIMIZERS) <= set(optimizers())
    for name in sorted(set(AVAILABLE_OPTIMIZERS) - set(APEX)):
        more = [f"{OPTIM}.relative_step=false"] if name == "adafactor" else []
        given = optim_of(f"{OPTIM}.name={name}", *more)
        del given["sched"], given["name"]
        AVAILABLE_OPTIMIZERS[name]([parameter()], **given)  # as NeMo's `setup_optimization`


@pytest.mark.nemo
def test_every_schedule_is_built_with_the_default_keys_and_steps() -> None:
    from nemo.core.optim.lr_scheduler import AVAILABLE_SCHEDULERS, prepare_lr_scheduler

    assert set(schedulers()) <= set(AVAILABLE_SCHEDULERS)  # where a collection may add its own
    for name in sorted(schedulers()):
        more = [f"{SCHED}.{each}" for each in NEEDED.get(name, [])]
        given = optim_of(f"{SCHED}.name={name}", *more)["sched"]
        optimizer = torch.optim.AdamW([parameter()], lr=1e-2)
        made: Any = prepare_lr_scheduler(optimizer, {**given, "max_steps": 100})
        optimizer.step()
        if name != "ReduceLROnPlateau":  # steps with a metric
            made["scheduler"].step()


@pytest.mark.nemo
@pytest.mark.parametrize("name", ["CosineAnnealing", "WarmupAnnealing", "PolynomialDecayAnnealing"])
def test_a_ratio_replaces_the_default_number_of_steps(name: str) -> None:
    from nemo.core.optim.lr_scheduler import prepare_lr_scheduler

    given = optim_of(f"{SCHED}.name={name}", f"{SCHED}.warmup_ratio=0.1")["sched"]
    assert "warmup_steps" not in given
    optimizer = torch.optim.AdamW([parameter()], lr=1e-2)
    made: Any = prepare_lr_scheduler(optimizer, {**given, "max_steps": 100})
    assert made["scheduler"].warmup_steps == 10


@pytest.mark.parametrize("override", [f"{SCHED}=null", f"{SCHED}.name=null"])
def test_without_a_schedule_the_rate_is_constant(override: str) -> None:
    """NeMo makes no schedule of an `optim` that has no key `sched`; a null ends in a TypeError."""
    assert "sched" not in optim_of(override)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["name=WarmupAnnealing", "constant_steps=3"], "constant_steps=3: WarmupAnnealing does"),
        (["name=StepLR", "step_size=3", "warmup_steps=7"], "warmup_steps=7: StepLR does not take"),
        (["name=StepLR", "step_size=3", "warmup_ratio=0.1"], "warmup_ratio=0.1: StepLR does not"),
        (["warmup_ratio=0.1", "warmup_steps=7"], "warmup_steps=7 are both given"),
        (["name=null", "warmup_steps=7"], "warmup_steps=7 has no effect without a schedule"),
        (["name=StepLR"], f"name=StepLR needs {SCHED}.step_size"),
        (["name=NoamAnnealing"], f"name=NoamAnnealing needs {SCHED}.d_model"),
        (["name=T5InverseSquareRootAnnealing"], f"needs {SCHED}.constant_steps"),
    ],
)
def test_what_a_schedule_cannot_take_is_refused_by_its_name(
    overrides: list[str], message: str
) -> None:
    assert message in refusal(TRAIN, *(f"{SCHED}.{each}" for each in overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["name=sgd", "betas=[0.8,0.9]"], "model.optim.betas=[0.8, 0.9]: sgd does not take it."),
        (["name=rprop", "weight_decay=0.1"], "model.optim.weight_decay=0.1: rprop does not take"),
        (["name=adafactor"], "set model.optim.relative_step=false"),
    ],
)
def test_what_an_optimizer_cannot_take_is_refused_by_its_name(
    overrides: list[str], message: str
) -> None:
    assert message in refusal(TRAIN, *(f"{OPTIM}.{each}" for each in overrides))
