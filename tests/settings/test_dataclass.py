"""Keys of every configuration: documented from the code, the same in YAML, unknown ones refused."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import re
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from nemo_kd.errors import NemoKDError
from nemo_kd.nemo.config import KDTrainingConfig
from nemo_kd.nemo.settings import dump, training
from nemo_kd.settings.blocks import all_keys
from nemo_kd.teacher.config import KDDumpConfig, dump_config
from tests.conftest import ROOT


def conf(name: str) -> DictConfig:
    cfg = OmegaConf.load(ROOT / "conf" / f"{name}.yaml")
    assert isinstance(cfg, DictConfig)
    return cfg


def generator() -> Any:
    """`docs/keys.py`, which is no package's."""
    spec = importlib.util.spec_from_file_location("keys", ROOT / "docs/keys.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_code_says() -> None:
    keys = generator()
    page = keys.PAGE.read_text()
    assert page == keys.with_tables(page), "run python docs/keys.py"
    for cls in (KDTrainingConfig, KDDumpConfig):
        for field in dataclasses.fields(cls):
            assert f"| `model.kd.{field.name}` |" in page
    for key in all_keys(dump.GENERATION):
        assert f"| `generation.{key}` |" in page
    names = ("store", "over_long", "shuffle_seed", "concat_sampling_probabilities")
    for key in names:
        assert f"| `model.data.train_ds.{key}` |" in page


@pytest.mark.parametrize(
    ("name", "cls"),
    [("train_gpt_sft_kd", KDTrainingConfig), ("dump_teacher_topk", KDDumpConfig)],
)
def test_yaml_has_every_key_of_model_kd_with_its_default(name: str, cls: type) -> None:
    block = OmegaConf.to_container(conf(name).model.kd)
    defaults = OmegaConf.to_container(OmegaConf.structured(cls))
    assert block == defaults and set(block) == {field.name for field in dataclasses.fields(cls)}


def test_the_blocks_of_the_yaml_are_those_of_the_checks() -> None:
    """Every key that is checked stands in the YAML too, with its explanation, and no other."""
    data = conf("dump_teacher_topk").data
    assert set(data) == set(dump.DATA)
    assert set(conf("generate_with_teacher").generation) == set(dump.GENERATION.keys)
    assert set(conf("train_gpt_sft_kd").model.data.train_ds) <= set(training.TRAIN_SPLIT)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model.kd.topk": 5}, "model.kd.topk is unknown; did you mean model.kd.top_k?"),
        ({"model.kd.alpha": 0.5}, "model.kd.alpha is unknown; Known: top_k"),
        ({"data.truncation": "left"}, "did you mean data.truncation_field?"),
        ({"teacher.knd": "hf"}, "did you mean teacher.kind?"),
        ({"generation.topp": 0.9}, "did you mean generation.top_p?"),
        ({"generation.filter.regex": "x"}, "generation.filter.regex is unknown"),
    ],
)
def test_a_dump_and_a_generation_refuse_unknown_keys(changed: dict[str, Any], message: str) -> None:
    cfg = OmegaConf.merge(conf("dump_teacher_topk"), conf("generate_with_teacher"))
    assert isinstance(cfg, DictConfig) and dump_config(cfg) == KDDumpConfig(temperatures=[1.0])  # type: ignore[arg-type]
    cfg.pop("hydra"), cfg.pop("defaults")
    for key in OmegaConf.missing_keys(cfg):
        OmegaConf.update(cfg, key, "x")
    for key, value in changed.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    with pytest.raises(NemoKDError, match=re.escape(message)):
        dump.check_keys(cfg)
