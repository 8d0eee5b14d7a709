"""Adapters are applied with the settings of their training, never with others of the command."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from nemo_kd.errors import NemoKDError
from nemo_kd.nemo import start
from nemo_kd.nemo.peft import SCHEMES, schemes_of
from nemo_kd.nemo.restored_adapters import (
    BLOCKS,
    DEFAULTS,
    MODULES,
    refuse_adapters_only,
    settle_adapters,
)
from tests.configuration import configuration
from tests.nemo_room.test_checks import EVALUATE, MERGE, TRAIN

LORA = {"adapter_dim": 4, "alpha": 64, "target_modules": ["all"], "variant": "nemo"}
SCHEME = "model.peft.peft_scheme=lora"
IN_LORA = "model.peft.lora_tuning"


def adapters(path: Path, scheme: str = "lora", **blocks: Any) -> Path:
    """A `.nemo` with the configuration of adapters, and no weights."""
    peft = {"peft_scheme": scheme, "restore_from_path": None, **blocks}
    text = yaml.safe_dump({"peft": peft}).encode()
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo("./model_config.yaml")
        member.size = len(text)
        archive.addfile(member, io.BytesIO(text))
    return path


def settled(path: Path, *overrides: str, name: str = EVALUATE) -> DictConfig:
    given = ["model.restore_from_path=model.nemo", f"model.peft.restore_from_path={path}"]
    cfg = configuration(name, *given, *["output=merged.nemo"] * (name == MERGE), *overrides)
    settle_adapters(cfg, schemes_of(cfg))
    return cfg


@pytest.mark.parametrize("name", [TRAIN, EVALUATE, MERGE])
def test_recorded_settings_replace_defaults_and_are_printed(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = adapters(tmp_path / "a.nemo", lora_tuning=LORA)
    tuning = OmegaConf.to_container(settled(path, SCHEME, name=name).model.peft, resolve=True)
    assert isinstance(tuning, dict) and tuning["lora_tuning"].items() >= LORA.items()
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line and f"{IN_LORA}.alpha=64" in line


def test_a_recorded_alpha_survives_a_change_of_adapter_dim(tmp_path: Path) -> None:
    """The command's alpha refers to adapter_dim: 32 by default, as recorded, but then 4."""
    path = adapters(tmp_path / "a.nemo", lora_tuning={**LORA, "alpha": 32})
    assert settled(path, SCHEME).model.peft.lora_tuning.alpha == 32


def test_a_recorded_alpha_of_null_is_the_recorded_adapter_dim(tmp_path: Path) -> None:
    path = adapters(tmp_path / "a.nemo", lora_tuning={"adapter_dim": 4, "alpha": None})
    assert settled(path, SCHEME).model.peft.lora_tuning.alpha == 4


@pytest.mark.parametrize(
    "overrides",
    [
        [f"{IN_LORA}.adapter_dim=4", f"{IN_LORA}.alpha=64"],
        [f"{IN_LORA}.target_modules=[attention,mlp]"],
        [f"{IN_LORA}.adapter_dropout=0.1"],  # of the training, not of the adapters
    ],
)
def test_settings_equal_to_the_recorded_ones_are_accepted(
    tmp_path: Path, overrides: list[str]
) -> None:
    path = adapters(tmp_path / "a.nemo", lora_tuning=LORA)
    assert settled(path, SCHEME, *overrides).model.peft.lora_tuning.alpha == 64


@pytest.mark.parametrize(
    ("key", "value", "then"),
    [("alpha", "16", "64"), ("adapter_dim", "8", "4"), ("target_modules", "[mlp_fc1]", "['all']")],
)
def test_another_setting_is_refused(tmp_path: Path, key: str, value: str, then: str) -> None:
    path = adapters(tmp_path / "a.nemo", lora_tuning=LORA)
    with pytest.raises(NemoKDError) as caught:
        settled(path, SCHEME, f"{IN_LORA}.{key}={value}")
    message = str(caught.value)
    assert message.startswith(f"{IN_LORA}.{key}=") and value.strip("[]") in message
    assert f"trained with {then}: remove the setting" in message and "\n" not in message


@pytest.mark.parametrize("name", [TRAIN, EVALUATE])
def test_adapters_without_a_scheme_are_refused(tmp_path: Path, name: str) -> None:
    path = adapters(tmp_path / "a.nemo", scheme="ia3")
    with pytest.raises(NemoKDError, match=r"no effect .* set model\.peft\.peft_scheme=ia3"):
        settled(path, name=name)


def test_another_scheme_is_refused(tmp_path: Path) -> None:
    path = adapters(tmp_path / "a.nemo", scheme="ia3")
    with pytest.raises(NemoKDError, match=r"are ia3: set model\.peft\.peft_scheme=ia3"):
        settled(path, SCHEME)


def test_a_complete_model_is_not_taken_for_adapters(tmp_path: Path) -> None:
    with pytest.raises(NemoKDError, match="adapters neither"):
        settled(adapters(tmp_path / "a.nemo", scheme="none"), SCHEME)


def test_adapters_are_not_taken_for_a_complete_model_by_any_script(tmp_path: Path) -> None:
    """As a dump restores its teacher, too; a `.nemo` that is compressed, of old, is NeMo's."""
    path = adapters(tmp_path / "a.nemo")
    with pytest.raises(NemoKDError, match="holds adapters only: merge it with the model of its"):
        start.checkpoint_config(path, Any, Any)  # before it uses them
    with tarfile.open(tmp_path / "old.nemo", "w:gz"):
        pass
    refuse_adapters_only(str(tmp_path / "old.nemo"))


@pytest.mark.parametrize("other", ["mixedfusedlayernorm", "layernorm"])
def test_the_layer_norm_that_a_cpu_replaces_is_the_same(tmp_path: Path, other: str) -> None:
    path = adapters(tmp_path / "a.nemo", scheme="adapter", adapter_tuning={"norm_type": other})
    settled(path, "model.peft.peft_scheme=adapter")


def test_the_defaults_are_those_of_the_yaml() -> None:
    peft = configuration(TRAIN, "model.restore_from_path=model.nemo").model.peft
    assert sorted(BLOCKS) == sorted(SCHEMES) and sorted(BLOCKS.values()) == sorted(DEFAULTS)
    for block, defaults in DEFAULTS.items():
        for key in defaults.keys() & peft[block].keys() - {"alpha"}:
            assert peft[block][key] == defaults[key], key
    assert peft.lora_tuning.alpha == peft.lora_tuning.adapter_dim


@pytest.mark.nemo
def test_the_names_of_modules_mean_what_they_mean_to_nemo() -> None:
    from nemo.collections.nlp.parts.peft_config import get_target_modules

    for name, parts in MODULES.items():
        assert tuple(get_target_modules({"target_modules": [name]})) == parts
