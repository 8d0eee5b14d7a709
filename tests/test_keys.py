"""Keys of every configuration: documented from the code, the same in YAML, unknown ones refused."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from nemo_kd.model.config import DATA_KEYS, KDTrainingConfig, check_data
from nemo_kd.teacher.config import DATA_KEYS as DUMP_DATA_KEYS
from nemo_kd.teacher.config import GENERATION_KEYS, KDDumpConfig, dump_config
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
    for key in (*GENERATION_KEYS[:-1], "filter.pattern", "filter.function"):
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


def test_the_keys_of_the_yaml_and_of_nemo_are_known() -> None:
    train = conf("train_gpt_sft_kd")
    check_data(train.model.data)
    spec = importlib.util.find_spec("nemo")
    assert spec and spec.submodule_search_locations
    models = Path(spec.submodule_search_locations[0]) / "collections/nlp/models/language_modeling"
    source = (models / "megatron_gpt_sft_model.py").read_text()
    read = set(re.findall(r"""data_cfg\.get\(\s*["'](\w+)""", source))
    read |= set(re.findall(r"data_cfg\.(\w+)", source)) - {"get"}
    assert len(read) > 25
    assert read <= {key for keys in DATA_KEYS.values() for key in keys}
    assert set(conf("dump_teacher_topk").data) <= set(DUMP_DATA_KEYS)
    assert set(conf("generate_with_teacher").generation) == set(GENERATION_KEYS)


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
    for key, value in changed.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    with pytest.raises(ValueError, match=re.escape(message)):
        dump_config(cfg)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("train_ds.overlong", "did you mean model.data.train_ds.over_long?"),
        ("train_ds.names", "model.data.train_ds.names is unknown"),
        ("validation_ds.stores", "did you mean model.data.validation_ds.store?"),
    ],
)
def test_a_training_refuses_unknown_keys_of_its_data(key: str, message: str) -> None:
    data = conf("train_gpt_sft_kd").model.data
    OmegaConf.update(data, key, "x", force_add=True)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_data(data)
