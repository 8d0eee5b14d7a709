"""The experts' auxiliary loss in a recipe: off, unless asked for. Bridge itself is not needed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest

OF_BRIDGE = 1e-3
"""The coefficient that Bridge gives a Qwen3-MoE."""
CONFIGS = (
    *("CheckpointConfig", "ConfigContainer", "DistributedDataParallelConfig", "LoggerConfig"),
    *("OptimizerConfig", "SchedulerConfig", "TokenizerConfig", "TrainingConfig"),
)


def module(name: str, **members: object) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(members)
    return made


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`nemo_kd.bridge.recipe` on stand-ins for Bridge's classes, which keep what they are given."""

    def config(**given: object) -> SimpleNamespace:
        return SimpleNamespace(rng=SimpleNamespace(), **given)

    bases = {name: type(name, (), {}) for name in ("DatasetBuildContext", "DatasetProvider")}
    stands = {
        "megatron.bridge": module("megatron.bridge", AutoBridge=mock.Mock()),
        "megatron.bridge.training": module("megatron.bridge.training"),
        "megatron.bridge.training.config": module(
            "megatron.bridge.training.config", **dict.fromkeys(CONFIGS, config), **bases
        ),
    }
    for name, each in stands.items():
        monkeypatch.setitem(sys.modules, name, each)
    found = import_module("nemo_kd.bridge.recipe")
    monkeypatch.setattr(found.cpu, "adapt", lambda config: None)
    yield found
    for name in ("recipe", "data"):  # they hold the stand-ins
        del sys.modules[f"nemo_kd.bridge.{name}"]


def coefficient(recipe: Any, experts: int | None, **settings: float) -> float:
    """`moe_aux_loss_coeff` of the student's provider in a recipe with these settings."""
    provider = SimpleNamespace(num_moe_experts=experts, moe_aux_loss_coeff=OF_BRIDGE)
    bridge = recipe.AutoBridge.from_hf_pretrained.return_value
    bridge.to_megatron_provider.return_value = provider
    config = recipe.finetune_config("student", ["store"], output="run", **settings)
    assert config.model is provider and provider.calculate_per_token_loss
    return float(provider.moe_aux_loss_coeff)


def test_it_is_off_for_a_student_with_experts(
    recipe: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert coefficient(recipe, experts=8) == 0.0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"the student's moe_aux_loss_coeff={OF_BRIDGE} is set to 0: ")


def test_it_is_kept_if_asked_for_with_a_line_about_padding(
    recipe: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert coefficient(recipe, experts=8, moe_aux_loss_coeff=0.01) == 0.01
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("moe_aux_loss_coeff=0.01: ") and "counts padding" in line


def test_a_dense_student_is_left_as_it_is(recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert coefficient(recipe, experts=None) == OF_BRIDGE
    assert capsys.readouterr().err == ""
