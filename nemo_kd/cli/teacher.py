"""The teacher's scripts after Hydra: dump it, let it generate; from a configuration to a store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_kd.nemo import start
from nemo_kd.nemo.settings import dump as settings
from nemo_kd.store import StoreSpec
from nemo_kd.store.codecs import codec_of
from nemo_kd.store.spec import MAX_VOCABULARY
from nemo_kd.teacher.config import dump_config

if TYPE_CHECKING:
    from nemo_kd.store import Manifest

KINDS = ("nemo", "hf")
PARALLEL_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
)


def run(cfg: DictConfig) -> None:
    """Restore the teacher, dump, and say what the store holds."""
    teacher, forward = load(cfg)
    from nemo_kd.teacher.dump import dump

    report(cfg, dump(cfg, teacher, forward))


def run_generation(cfg: DictConfig) -> None:
    """Restore the teacher, let it write the answers, and say what the store holds."""
    teacher, _ = load(cfg)
    from nemo_kd.hf.writer import HFWriter
    from nemo_kd.mcore.writer import NemoWriter
    from nemo_kd.teacher.generation.generate import generate

    def writer(*arguments: Any) -> Any:
        if cfg.teacher.kind == "hf":
            return HFWriter(teacher.model, *arguments)
        return NemoWriter(teacher, *arguments)

    report(cfg, generate(cfg, teacher, writer))


def report(cfg: DictConfig, manifest: Manifest | None) -> None:
    """On rank 0, one line about a finished store."""
    if manifest is not None and torch.distributed.get_rank() == 0:
        totals = manifest.totals
        each = totals["bytes"] / max(totals["answer_tokens"], 1)
        rows = manifest.spec.source["rows"]
        of = f" of {rows} rows" if "generation" not in cfg and totals["samples"] < rows else ""
        print(
            f"{cfg.output_dir}: {totals['samples']} samples{of}, {totals['answer_tokens']} answer "
            f"tokens, {totals['bytes'] / 1e6:.1f} MB ({each:.0f} bytes a token)"
        )


def load(cfg: DictConfig) -> tuple[Any, Callable[..., Any]]:
    """The teacher of `teacher.kind`, process groups started, and the class of its forward pass."""
    settings.check_keys(cfg)
    check_store_settings(cfg)
    check_kind(cfg)
    start.refuse(cfg)
    settings.check_inputs(cfg)
    start.prepare(cfg)
    # NeMo and Megatron only now: on a CPU they must find their patches in place.
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import (
        MegatronGPTSFTModel,
    )

    _complete(cfg)
    trainer = start.build_trainer(cfg)
    start.start_process_groups(cfg.model, trainer)
    if cfg.teacher.kind == "hf":
        from nemo_kd.hf.teacher import HFForward, load_teacher

        return load_teacher(cfg), HFForward
    from nemo_kd.mcore.teacher import TopKForward

    model = start.restore(cfg.model.restore_from_path, MegatronGPTSFTModel, cfg, trainer)
    model.freeze()
    return model.to(torch.cuda.current_device()), TopKForward


def check_store_settings(cfg: DictConfig) -> None:
    """Refuse what no store can hold before the teacher is loaded, which may take minutes."""
    kd = dump_config(cfg)
    spec = StoreSpec(
        top_k=kd.top_k,
        vocab_size=MAX_VOCABULARY,  # the teacher's is not known yet
        temperatures=tuple(kd.temperatures),
        rows_per_shard=cfg.rows_per_shard,
        profile=kd.profile,
        profile_options=kd.profile_options,
    )
    codec_of(spec)


def check_kind(cfg: DictConfig) -> None:
    """Refuse a teacher of the wrong kind before the slow imports."""
    kind, path = cfg.teacher.kind, Path(cfg.model.restore_from_path)
    if kind not in KINDS:
        raise start.LayoutError(f"teacher.kind={kind}: expected one of {', '.join(KINDS)}")
    if kind == "nemo":
        if (path / "config.json").is_file() or path.suffix == ".gguf":
            raise start.LayoutError(
                f"{path} is a Hugging Face checkpoint: set teacher.kind=hf, or make a .nemo of it "
                "with examples/convert_hf_to_nemo.py"
            )
        if cfg.model.context_parallel_size > 1:
            raise start.LayoutError(
                f"model.context_parallel_size={cfg.model.context_parallel_size}: a forward pass "
                "alone needs none; set it to 1, and for long samples raise "
                "model.tensor_model_parallel_size or lower max_tokens_per_micro_batch"
            )
        return
    if path.suffix == ".nemo":
        raise start.LayoutError(f"{path} is NeMo's: set teacher.kind=nemo")
    for key in PARALLEL_SIZES:
        if cfg.model[key] > 1:
            raise start.LayoutError(
                f"model.{key}={cfg.model[key]}: a Hugging Face teacher (teacher.kind=hf) is whole "
                "on each rank, only data parallelism works; set it to 1, or make a .nemo of the "
                "teacher with examples/convert_hf_to_nemo.py"
            )


def _complete(cfg: DictConfig) -> None:
    """What NeMo's model asks of a configuration and a dump has no use for."""
    model_parallel = cfg.model.tensor_model_parallel_size * cfg.model.pipeline_model_parallel_size
    replicas = max(cfg.trainer.devices * cfg.trainer.num_nodes // model_parallel, 1)
    with open_dict(cfg):
        cfg.model.global_batch_size = cfg.model.micro_batch_size * replicas
        cfg.model.optim = {"name": "adamw" if cfg.trainer.accelerator == "cpu" else "fused_adam"}
        cfg.model.gradient_as_bucket_view = False
        loss = {"metric": {"name": "loss"}}
        data = {"chat": cfg.data.chat, "validation_ds": loss, "test_ds": loss}
        cfg.model.data = OmegaConf.create(data)
        cfg.exp_manager = None
