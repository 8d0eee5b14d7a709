"""A dump's configuration from Hydra: its keys, values and paths checked, then as dataclasses."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_kd.errors import NemoKDError
from nemo_kd.settings.batches import check_processes, data_parallel_size
from nemo_kd.settings.blocks import Block, check
from nemo_kd.settings.dataclass import block_of, checked_settings_of
from nemo_kd.settings.files import (
    Problem,
    check_files,
    file,
    file_or_directory,
    output_directory,
    paths_at,
)
from nemo_kd.settings.moved import DUMP
from nemo_kd.settings.templates import check_template
from nemo_kd.settings.values import shown
from nemo_kd.teacher.config import DumpConfig, GenerateConfig, TopKConfig

EARLIER = "model.kd"
"""Where the block `dump` may stand too."""


def read(
    cfg: DictConfig, frameworks: Mapping[str, Block] | None = None, given: Collection[str] = ()
) -> DumpConfig:
    """Check the keys and values of a dump, or of a generation, and convert it.

    `frameworks`: block (`trainer`, `model`) → the further keys that the teacher's framework reads
    there; `given`: keys that the command line sets. Moves `model.kd` to `dump` in `cfg`.

    Errors: NemoKDError for an unknown key or a value of the wrong kind.
    """
    cls = GenerateConfig if "generation" in cfg else DumpConfig
    check(cfg, _block(cls, frameworks or {}))
    _settle(cfg, given)
    return checked_settings_of(cls, cfg)


def _block(cls: type[DumpConfig], frameworks: Mapping[str, Block]) -> Block:
    keys = dict(block_of(cls).keys)
    keys["model"] = _with(keys["model"], Block({"kd": block_of(TopKConfig)}))
    for name, more in frameworks.items():
        keys[name] = _with(keys[name], more)
    return Block(keys, moved=DUMP)


def _with(own: object, more: Block) -> Block:
    assert isinstance(own, Block)
    return replace(own, keys={**more.keys, **own.keys}, more=more.more)


def _settle(cfg: DictConfig, given: Collection[str]) -> None:
    """Move the keys of `model.kd` to `dump`.

    Errors: NemoKDError for one that has another value in `dump`, unless that is a default.
    """
    earlier, defaults = OmegaConf.select(cfg, EARLIER), TopKConfig()
    with open_dict(cfg):
        cfg.setdefault("dump", {})
        for key in map(str, earlier or ()):
            ours = cfg.dump.get(key, getattr(defaults, key))
            is_set = f"dump.{key}" in given or _plain(ours) != _plain(getattr(defaults, key))
            if is_set and ours != earlier[key]:
                raise NemoKDError(
                    f"dump.{key}={shown(_plain(ours))} and {EARLIER}.{key}="
                    f"{shown(_plain(earlier[key]))} mean the same; give one of them"
                )
            cfg.dump[key] = earlier[key]
        cfg.model.pop("kd", None)


def _plain(value: object) -> object:
    value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return list(value) if isinstance(value, tuple) else value


def check_inputs(cfg: DictConfig) -> None:
    """Errors: NemoKDError for a path that does not exist, a template or sizes that cannot work."""
    check_files(
        cfg,
        [
            ("model.restore_from_path", TEACHERS[cfg.teacher.kind]),
            ("data.file_path", file("SFT file")),
            ("output_dir", output_directory),
        ],
    )
    check_processes(cfg)
    data_parallel_size(cfg)
    if not cfg.data.chat:
        check_template(cfg.data, "data", paths_at(cfg, "data.file_path"))


TEACHERS: dict[str, Problem] = {
    "nemo": file_or_directory(
        "checkpoint",
        ("model_config.yaml", "config.json"),  # a Hugging Face directory is refused by name later
        "; set model.restore_from_path to a .nemo file (examples/convert_hf_to_nemo.py makes one "
        "from a Hugging Face checkpoint)",
    ),
    "hf": file_or_directory(
        "checkpoint",
        ("config.json",),
        "; set model.restore_from_path to a directory with config.json and *.safetensors, or to a "
        ".gguf file",
    ),
}
