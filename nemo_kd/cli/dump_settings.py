"""Check a dump's Hydra configuration (keys, values, paths) and convert it to dataclasses."""

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
    directory,
    file_or_directory,
    paths_at,
    store_directory,
)
from nemo_kd.settings.moved import DUMP
from nemo_kd.settings.templates import check_template
from nemo_kd.settings.values import shown
from nemo_kd.sft.previews import first_rows, problem_of
from nemo_kd.teacher.config import DumpConfig, GenerateConfig, TopKConfig

EARLIER = "model.kd"
"""Earlier location of the block `dump`, still accepted."""


def read(
    cfg: DictConfig, frameworks: Mapping[str, Block] | None = None, given: Collection[str] = ()
) -> DumpConfig:
    """Check the keys and values of a dump or generation and convert them to dataclasses.

    `frameworks` maps a block (`trainer`, `model`) to the additional keys that the teacher's
    framework reads in it; `given` are the keys set on the command line. Moves `model.kd` to `dump`
    in `cfg`.

    Raises NemoKDError for an unknown key or a value of the wrong type.
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

    Raises NemoKDError if `dump` sets a key to a different, non-default value.
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
    """Raise NemoKDError for missing paths, an invalid template or inconsistent process counts."""
    check_files(
        cfg,
        [
            TEACHERS[cfg.teacher.kind],
            ("output_dir", store_directory),
        ],
    )
    files = list(paths_at(cfg, "data.file_path"))
    if found := problem_of(files):
        raise NemoKDError(f"data.file_path: {found}")
    check_processes(cfg)
    data_parallel_size(cfg)
    if not cfg.data.chat:
        check_template(cfg.data, "data", first_rows(files))


TEACHERS: dict[str, tuple[str, Problem]] = {
    "nemo": (
        "model.restore_from_path",
        file_or_directory(
            "checkpoint",
            ("model_config.yaml", "config.json"),  # a later check rejects Hugging Face directories
            "; set model.restore_from_path to a .nemo file (examples/convert_hf_to_nemo.py makes "
            "one from a Hugging Face checkpoint)",
        ),
    ),
    "hf": (
        "model.restore_from_path",
        file_or_directory(
            "checkpoint",
            ("config.json",),
            "; set model.restore_from_path to a directory with config.json and *.safetensors, or "
            "to a .gguf file",
        ),
    ),
    "mcore": (
        "model.restore_from_path",
        file_or_directory(
            "checkpoint",
            (
                *("config.json", ".metadata", "latest_checkpointed_iteration.txt"),
                "model_config.yaml",
            ),
            "; set model.restore_from_path to a directory of Megatron-LM (iter_0000010/, or the "
            "one above it), a Hugging Face directory with config.json, a .gguf or a .nemo",
        ),
    ),
    "served": ("teacher.tokenizer", directory("tokenizer")),
}
"""Kind of teacher → key of the path that it is loaded from, and the check of the path."""
