"""The teacher's scripts after Hydra, dump and generation: from a configuration to a store."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from nemo_kd.cli.overrides import given_keys
from nemo_kd.nemo import start
from nemo_kd.nemo.settings import dump as nemo
from nemo_kd.settings.values import shown
from nemo_kd.store import StoreSpec
from nemo_kd.store.codecs import codec_of
from nemo_kd.store.spec import MAX_VOCABULARY
from nemo_kd.teacher import settings
from nemo_kd.teacher.config import DumpConfig
from nemo_kd.teacher.layout import LayoutError

if TYPE_CHECKING:
    from nemo_kd.sft.rows import SFTRows
    from nemo_kd.store import Manifest
    from nemo_kd.teacher.interface import Teacher

NEMO_ONLY = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "sequence_parallel": False,
    "megatron_amp_O2": False,
}
"""Keys of `model` that a Hugging Face teacher has no use for, with their defaults."""


def run(cfg: DictConfig) -> None:
    """Load the teacher, dump, and print what the store holds."""
    teacher = load(cfg)
    from nemo_kd.teacher.dump import dump

    report(cfg, teacher, dump(cfg, teacher, rows_of(cfg, teacher)))


def run_generation(cfg: DictConfig) -> None:
    """Load the teacher, generate answers, and print what the store holds."""
    teacher = load(cfg)
    from nemo_kd.teacher.generation.generate import generate

    report(cfg, teacher, generate(cfg, teacher))


def report(cfg: DictConfig, teacher: Teacher, manifest: Manifest | None) -> None:
    """Print on rank 0 a line about a finished store."""
    if manifest is None or teacher.layout.rank:
        return
    totals = manifest.totals
    each = totals["bytes"] / max(totals["answer_tokens"], 1)
    rows = manifest.spec.source["rows"]
    of = f" of {rows} rows" if "generation" not in cfg and totals["samples"] < rows else ""
    print(
        f"{cfg.output_dir}: {totals['samples']} samples{of}, {totals['answer_tokens']} answer "
        f"tokens, {totals['bytes'] / 1e6:.1f} MB ({each:.0f} bytes per token)"
    )


def load(cfg: DictConfig) -> Teacher:
    """The teacher of `teacher.kind`, with the processes of its layout started.

    NeMo is imported for `nemo` only.
    """
    check_store_settings(read(cfg))
    check_kind(cfg)
    settings.check_inputs(cfg)
    if cfg.teacher.kind == "hf":
        from nemo_kd.hf.teacher import load_teacher as load_hf

        return load_hf(cfg)
    start.prepare(cfg)  # on a CPU, its patches come before NeMo and Megatron
    from nemo_kd.nemo.teacher import load_teacher as load_nemo

    return load_nemo(cfg)


def rows_of(cfg: DictConfig, teacher: Teacher) -> SFTRows:
    """The rows of `data.file_path`; conversations are read by NeMo, whatever the teacher is."""
    from nemo_kd.teacher.rows import max_seq_length, sft_rows

    if not cfg.data.chat:
        return sft_rows(cfg, teacher)
    if importlib.util.find_spec("nemo") is None:
        raise LayoutError(
            "data.chat=true: conversations are read by NeMo, which is not installed; install "
            "nemo_toolkit, or write the format of one turn into data.prompt_template"
        )
    start.install()
    from nemo_kd.nemo.conversations import conversation_rows

    return conversation_rows(cfg.data.file_path, teacher.tokenizer, max_seq_length(cfg, teacher))


def read(cfg: DictConfig) -> DumpConfig:
    """The configuration as dataclasses, with NeMo's keys checked for a NeMo teacher only."""
    is_nemo = OmegaConf.select(cfg, "teacher.kind") == "nemo"
    return settings.read(cfg, nemo.BLOCKS if is_nemo else {}, given_keys())


def check_store_settings(config: DumpConfig) -> None:
    """Refuse what no store can hold before the teacher is loaded, which may take minutes."""
    dump = config.dump
    spec = StoreSpec(
        top_k=dump.top_k,
        vocab_size=MAX_VOCABULARY,  # the teacher's is not known yet
        temperatures=dump.temperatures,
        rows_per_shard=config.rows_per_shard,
        profile=dump.profile,
        profile_options=dump.profile_options,
    )
    codec_of(spec)


def check_kind(cfg: DictConfig) -> None:
    """Refuse a teacher of the wrong kind before the slow imports."""
    path = Path(cfg.model.restore_from_path)
    if cfg.teacher.kind == "nemo":
        if (path / "config.json").is_file() or path.suffix == ".gguf":
            raise LayoutError(
                f"{path} is a Hugging Face checkpoint: set teacher.kind=hf, or convert it to .nemo "
                "with examples/convert_hf_to_nemo.py"
            )
        start.refuse(cfg)
        return
    if path.suffix == ".nemo":
        raise LayoutError(f"{path} is NeMo's: set teacher.kind=nemo")
    for key, default in NEMO_ONLY.items():
        if cfg.model.get(key, default) != default:
            raise LayoutError(
                f"model.{key}={shown(cfg.model[key])}: each rank holds all of a Hugging Face "
                "teacher (teacher.kind=hf), in trainer.precision, so only data parallelism works; "
                f"set it to {shown(default)}, or convert the teacher to .nemo with "
                "examples/convert_hf_to_nemo.py"
            )
