"""Settings of a feature that is off are named; the defaults of the YAML are not."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_kd.nemo.settings.unused import DEFAULTS, unused
from tests.settings.test_keys import TRAIN, check, configuration

LORA = "model.peft.lora_tuning"
STOPPING = "exp_manager.early_stopping_callback_params"
STOP = "exp_manager.create_early_stopping_callback=true"


def test_the_defaults_are_those_of_the_yaml() -> None:
    cfg = configuration(TRAIN)
    for block, defaults in DEFAULTS.items():
        given: Any = OmegaConf.select(cfg, block)
        assert ({} if given is None else OmegaConf.to_container(given, resolve=True)) == defaults
    assert unused(check(TRAIN)) == []


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            [f"{LORA}.adapter_dim=8"],  # alpha follows it
            f"{LORA}.adapter_dim=8 without effect: model.peft.peft_scheme=none trains all weights",
        ),
        (
            [f"{LORA}.target_modules=[all]", f"{LORA}.alpha=64"],
            f"{LORA}.target_modules=['all'], {LORA}.alpha=64 without effect: model.peft.peft_",
        ),
        ([f"{STOPPING}.patience=3"], f"{STOPPING}.patience=3 without effect: set {STOP}"),
        (
            ["exp_manager.ema.decay=0.5"],
            "exp_manager.ema.decay=0.5 without effect: set exp_manager.ema.enable=true",
        ),
    ],
)
def test_what_is_off_is_named(overrides: list[str], line: str) -> None:
    (found,) = unused(check(TRAIN, *overrides))
    assert found.startswith(line)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.peft.peft_scheme=lora", f"{LORA}.adapter_dim=8"],
        [STOP, f"{STOPPING}.patience=3"],
        ["exp_manager.ema.enable=true", "exp_manager.ema.decay=0.5"],
        ["exp_manager.ema.enable=false"],
        [f"{LORA}.adapter_dim=32", f"{LORA}.position_embedding_strategy=null"],  # as in NeMo's file
    ],
)
def test_what_is_on_or_the_default_is_not(overrides: list[str]) -> None:
    assert unused(check(TRAIN, *overrides)) == []
