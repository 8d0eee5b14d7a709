"""Keys of every configuration: documented from the code, the same in YAML, unknown ones refused."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import re
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from nemo_kd.cli import dump_settings as settings
from nemo_kd.cli.teacher import read
from nemo_kd.errors import NemoKDError
from nemo_kd.nemo.config import KDTrainingConfig
from nemo_kd.nemo.resumed_settings import flatten
from nemo_kd.nemo.settings import training
from nemo_kd.settings.blocks import all_keys
from nemo_kd.settings.dataclass import block_of, settings_of
from nemo_kd.teacher.config import DumpConfig, GenerateConfig, TopKConfig
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
    blocks = [(KDTrainingConfig, "model.kd."), (GenerateConfig, "")]
    for key in (f"{prefix}{key}" for cls, prefix in blocks for key in all_keys(block_of(cls))):
        assert f"| `{key}` |" in page, key
    names = ("store", "over_long", "shuffle_seed", "concat_sampling_probabilities")
    for key in names:
        assert f"| `model.data.train_ds.{key}` |" in page


def defaults(cls: type) -> dict[str, Any]:
    """Dotted key → default of a dataclass and those within it; `???` where there is none."""
    return {
        key: default
        for key, default, _ in generator().of_dataclass(f"{cls.__module__}.{cls.__name__}")
    }


@pytest.mark.parametrize(
    ("names", "cls"),
    [
        (["dump_teacher_topk"], DumpConfig),
        (["dump_teacher_topk", "generate_with_teacher"], GenerateConfig),
    ],
)
def test_the_yaml_of_a_dump_has_every_key_with_its_default(names: list[str], cls: type) -> None:
    cfg = OmegaConf.merge(*map(conf, names))
    assert isinstance(cfg, DictConfig)
    for name in ("hydra", "defaults"):
        cfg.pop(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LOCAL_WORLD_SIZE", raising=False)
        tree: Any = OmegaConf.to_container(cfg, resolve=True)
        yaml = flatten(tree)
    empty = (
        "dump.profile_options data.chat_template_kwargs data.chat_prompt_tokens teacher.arguments"
    )
    for key in empty.split():
        yaml.setdefault(key, {})
    expected = {key: list(v) if isinstance(v, tuple) else v for key, v in defaults(cls).items()}
    kind = "hf" if cls is GenerateConfig else "nemo"
    assert yaml == expected | {"teacher.kind": kind}


def test_the_yaml_of_a_training_has_every_key_of_model_kd_with_its_default() -> None:
    block = conf("train_gpt_sft_kd").model.kd
    assert OmegaConf.to_container(block) == dataclasses.asdict(KDTrainingConfig())
    assert settings_of(KDTrainingConfig, block, "model.kd") == KDTrainingConfig()


def test_the_data_block_of_the_yaml_has_no_key_that_is_not_checked() -> None:
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
    with pytest.raises(NemoKDError, match=re.escape(message)):
        read(generation(changed))


def generation(changed: dict[str, Any]) -> DictConfig:
    """A configuration of a generation, with `x` for the keys that must be given."""
    cfg = OmegaConf.merge(conf("dump_teacher_topk"), conf("generate_with_teacher"))
    assert isinstance(cfg, DictConfig)
    cfg.pop("hydra"), cfg.pop("defaults")
    for key in OmegaConf.missing_keys(cfg):
        OmegaConf.update(cfg, key, "x")
    for key, value in changed.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    return cfg


def test_keys_of_the_dump_may_stand_under_model_kd() -> None:
    cfg = generation({"model.kd.top_k": 5, "model.kd.profile_options": {"seed": 1}})
    assert read(cfg).dump == TopKConfig(top_k=5, profile_options={"seed": 1})
    assert cfg.dump.top_k == 5 and "kd" not in cfg.model
    both = {"dump.top_k": 5, "model.kd.top_k": 5}
    assert read(generation(both)).dump.top_k == 5


def test_two_values_for_one_key_of_the_dump_are_an_error() -> None:
    message = re.escape("dump.top_k=6 and model.kd.top_k=5 mean the same; give one of them")
    with pytest.raises(NemoKDError, match=message):
        read(generation({"dump.top_k": 6, "model.kd.top_k": 5}))
    cfg = generation({"model.kd.top_k": 5})
    with pytest.raises(NemoKDError, match=re.escape("dump.top_k=100 and model.kd.top_k=5")):
        settings.read(cfg, given={"dump.top_k", "model.kd.top_k"})


def test_keys_of_nemo_are_for_its_teachers_only() -> None:
    assert read(generation({"teacher.kind": "nemo", "model.fp8": False})).teacher.kind == "nemo"
    with pytest.raises(NemoKDError, match=r"model\.fp8 is unknown"):
        read(generation({"model.fp8": False}))
