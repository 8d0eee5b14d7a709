"""The jobs dump and generate: from a Hydra configuration to a store."""

from __future__ import annotations

import copy
import importlib.util
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from nemo_kd.cli import dump_settings as settings
from nemo_kd.cli.overrides import given_keys
from nemo_kd.extras import install
from nemo_kd.nemo import start
from nemo_kd.nemo.settings import dump as nemo
from nemo_kd.settings.values import shown
from nemo_kd.store import StoreSpec
from nemo_kd.store.codecs import codec_of
from nemo_kd.store.spec import MAX_VOCABULARY
from nemo_kd.teacher.config import DumpConfig, GenerateConfig, TeacherModelConfig
from nemo_kd.teacher.layout import LayoutError

if TYPE_CHECKING:
    from nemo_kd.sft.config import RowConfig
    from nemo_kd.sft.reader import Model, NemosEncoder
    from nemo_kd.sft.rows import Encoder
    from nemo_kd.store import Manifest
    from nemo_kd.teacher.interface import Teacher

MEGATRONS_ONLY = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "sequence_parallel",
    "megatron_amp_O2",
)
"""Keys of `model` that apply to the kinds `nemo` and `mcore` only."""


def run(cfg: DictConfig) -> None:
    """Load the teacher, dump its top-K, and print a summary of the store."""
    config = read(cfg)
    teacher = load(config, cfg)
    from nemo_kd.teacher.dump import dump
    from nemo_kd.teacher.rows import sft_rows

    report(config, teacher, dump(config, teacher, sft_rows(config, teacher, nemos_encoder())))


def run_generation(cfg: DictConfig) -> None:
    """Load the teacher, generate answers, and print a summary of the store."""
    config = read(cfg)
    assert isinstance(config, GenerateConfig)
    teacher = load(config, cfg)
    from nemo_kd.teacher.generation.generate import generate

    report(config, teacher, generate(config, teacher))


def report(config: DumpConfig, teacher: Teacher, manifest: Manifest | None) -> None:
    """Print a one-line summary of a finished store, on rank 0."""
    if manifest is None or teacher.layout.rank:
        return
    totals = manifest.totals
    each = totals["bytes"] / max(totals["answer_tokens"], 1)
    rows = manifest.spec.source["rows"]
    is_dump = not isinstance(config, GenerateConfig)
    of = f" of {rows} rows" if is_dump and totals["samples"] < rows else ""
    print(
        f"{config.output_dir}: {totals['samples']} samples{of}, {totals['answer_tokens']} answer "
        f"tokens, {totals['bytes'] / 1e6:.1f} MB ({each:.0f} bytes per token)"
    )


def read(cfg: DictConfig) -> DumpConfig:
    """Check the configuration and convert it to dataclasses.

    Keys of NeMo itself are accepted only for a NeMo teacher.
    """
    is_nemo = OmegaConf.select(cfg, "teacher.kind") == "nemo"
    return settings.read(cfg, nemo.BLOCKS if is_nemo else {}, given_keys())


def load(config: DumpConfig, cfg: DictConfig) -> Teacher:
    """Check the configuration, start the job's processes and load the teacher of `teacher.kind`.

    NeMo is imported only for kind `nemo`, whose model is built from `cfg` with NeMo's keys.
    """
    check_store_settings(config)
    check_kind(config)
    if config.teacher.kind == "nemo":
        start.refuse(cfg)
    settings.check_inputs(cfg)
    if config.teacher.kind == "hf":
        from nemo_kd.hf.teacher import load_teacher as load_hf

        return load_hf(config)
    if config.teacher.kind == "served":
        return _load_served(config)
    if config.teacher.kind == "mcore":
        return _load_mcore(config)
    cfg = copy.deepcopy(cfg)  # `prepare` adds keys that NeMo needs
    start.prepare(cfg)  # on a CPU, its patches must precede the imports of NeMo and Megatron
    from nemo_kd.nemo.teacher import load_teacher as load_nemo

    return load_nemo(cfg)


def _load_served(config: DumpConfig) -> Teacher:
    missing = [each for each in ("httpx", "tenacity") if importlib.util.find_spec(each) is None]
    if missing:
        raise LayoutError(f"teacher.kind=served needs {' and '.join(missing)}: {install('served')}")
    from nemo_kd.served.teacher import load_teacher as load_served

    return load_served(config)


def _load_mcore(config: DumpConfig) -> Teacher:
    if importlib.util.find_spec("megatron") is None:
        raise LayoutError("teacher.kind=mcore needs megatron-core: pip install megatron-core")
    from nemo_kd.mcore import cpu

    cpu.install()  # its patches must precede the imports of Megatron
    from nemo_kd.mcore.loading import load_teacher as load_mcore

    return load_mcore(config)


def nemos_encoder() -> NemosEncoder | None:
    """Return the maker of encoders by NeMo; None if it is not installed."""
    if importlib.util.find_spec("nemo") is None:
        return None

    def make(config: RowConfig, model: Model) -> Encoder:
        start.install()
        from nemo_kd.nemo.conversations import NemosConversations

        return NemosConversations(config, model)

    return make


def check_store_settings(config: DumpConfig) -> None:
    """Raise StoreError for invalid store settings before the teacher loads, which takes minutes."""
    dump = config.dump
    spec = StoreSpec(
        top_k=dump.top_k,
        vocab_size=MAX_VOCABULARY,  # the actual size is not known yet
        temperatures=dump.temperatures,
        rows_per_shard=config.rows_per_shard,
        profile=dump.profile,
        profile_options=dump.profile_options,
    )
    codec_of(spec)


def check_kind(config: DumpConfig) -> None:
    """Raise LayoutError if the checkpoint does not match `teacher.kind`, before slow imports.

    Also rejects a layout for teachers that have none, and a checkpoint or a generation with a
    served one.
    """
    if config.teacher.kind == "served":
        if config.model.restore_from_path is not None:
            raise LayoutError(
                "model.restore_from_path is not used with teacher.kind=served, whose model is "
                "behind teacher.url; leave it out, or set teacher.kind=hf or nemo"
            )
        if isinstance(config, GenerateConfig):
            raise LayoutError(
                "teacher.kind=served does not generate answers; set teacher.kind=hf or nemo"
            )
        _refuse_split(config, "the server decides how its model is split (teacher.kind=served)")
        return
    path = config.model.checkpoint
    if config.teacher.kind == "mcore":
        return
    if config.teacher.kind == "nemo":
        if (path / "config.json").is_file() or path.suffix == ".gguf":
            raise LayoutError(
                f"{path} is a Hugging Face checkpoint: set teacher.kind=hf, or convert it to .nemo "
                "with examples/convert_hf_to_nemo.py"
            )
        return
    if path.suffix == ".nemo":
        raise LayoutError(f"{path} is NeMo's: set teacher.kind=nemo")
    _refuse_split(
        config,
        "each rank holds all of a Hugging Face teacher (teacher.kind=hf), in trainer.precision, so "
        "only data parallelism works",
        ", or set teacher.kind=mcore, or convert the teacher to .nemo with "
        "examples/convert_hf_to_nemo.py",
    )


def _refuse_split(config: DumpConfig, reason: str, instead: str = "") -> None:
    for key in MEGATRONS_ONLY:
        value, default = getattr(config.model, key), getattr(TeacherModelConfig, key)
        if value != default:
            raise LayoutError(
                f"model.{key}={shown(value)}: {reason}; set it to {shown(default)}{instead}"
            )
