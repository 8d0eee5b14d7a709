"""Start NeMo on any layout: build the trainer and process groups, restore a `.nemo`.

The functions import NeMo when they are called, after `nemo_kd.nemo.cpu.install()`.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_kd.checkpoints.distributed import METADATA, DistributedCheckpoint, files_of
from nemo_kd.checkpoints.source import WEIGHTS
from nemo_kd.checkpoints.tokenizer import resolve_tokenizer
from nemo_kd.errors import NemoKDError
from nemo_kd.nemo import cpu
from nemo_kd.nemo.adamw import register_adamw
from nemo_kd.nemo.groups import DEFAULTS, group_settings, refuse_groups
from nemo_kd.nemo.installed import imports_of_nemo
from nemo_kd.nemo.restored_adapters import refuse_adapters_only
from nemo_kd.settings.batches import data_parallel_size
from nemo_kd.teacher.layout import LayoutError

if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel

Model = TypeVar("Model", bound="MegatronGPTModel")

EMBEDDING = "model.embedding.word_embeddings.weight"

CPU_PRECISIONS = ("32", "bf16", "bf16-mixed")
"""Values of `trainer.precision` that work on a CPU."""


def prepare(cfg: DictConfig) -> None:
    """Adapt a script's configuration to this machine: on a CPU, turn off what needs a GPU.

    Call before any import of NeMo.
    """
    refuse(cfg)
    if not install():
        return
    with open_dict(cfg):
        for key, value in cpu.cpu_settings(cfg.trainer.precision).items():
            OmegaConf.update(cfg, key, value, force_add=True)
        if cfg.model.get("optim") and cfg.model.optim.name in ("fused_adam", "megatron_fused_adam"):
            cfg.model.optim.name = "adamw"  # the same arithmetic without apex
        norm = OmegaConf.select(cfg, "model.peft.adapter_tuning.norm_type")
        if norm == "mixedfusedlayernorm":
            cfg.model.peft.adapter_tuning.norm_type = "layernorm"  # likewise


def install() -> bool:
    """Import NeMo, quietly; True if it is patched for a CPU.

    Errors: NemoKDError for a NeMo without its SFT model, or without a package that it imports.
    """
    # NeMo compiles a helper with `python3 -m pybind11`, which must find this environment's python.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    verbose = bool(os.environ.get("NEMO_KD_VERBOSE"))
    if not verbose:
        warnings.filterwarnings("ignore")  # NeMo's imports warn about features that are not used
    with imports_of_nemo():
        on_cpu = cpu.install()
        if not verbose:
            _quiet()
        import nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model  # noqa: F401

        if not on_cpu:
            register_adamw()
    return on_cpu


def refuse(cfg: DictConfig) -> None:
    """Refuse settings that NeMo or this machine does not support.

    Errors: LayoutError.
    """
    _refuse_virtual_pipeline(cfg)
    refuse_groups(cfg)
    if not torch.cuda.is_available():
        _refuse_on_cpu(cfg)


def _refuse_virtual_pipeline(cfg: DictConfig) -> None:
    size = cfg.model.get("virtual_pipeline_model_parallel_size") or 1
    if size > 1:
        raise LayoutError(
            f"model.virtual_pipeline_model_parallel_size={size}: NeMo builds no virtual "
            "pipelines on any device; leave it at null, or train with nemo_kd.mcore "
            "(examples/megatron_core/train.py --virtual-pipeline)"
        )


def _refuse_on_cpu(cfg: DictConfig) -> None:
    """Refuse settings that fail deep inside Megatron or silently give wrong results on a CPU."""
    precision, model = str(cfg.trainer.precision), cfg.model
    if precision not in CPU_PRECISIONS:
        raise LayoutError(
            f"trainer.precision={precision} does not work on a CPU; "
            f"choose one of {', '.join(CPU_PRECISIONS)}"
        )
    if precision != "32" and model.pipeline_model_parallel_size > 1:
        # Stages would send tensors of another dtype than Megatron's buffers: wrong gradients.
        raise LayoutError(
            f"trainer.precision={precision} does not work over pipeline stages on a CPU; set "
            "trainer.precision=32 or model.pipeline_model_parallel_size=1"
        )
    if model.get("context_parallel_size", 1) > 1:
        raise LayoutError(
            f"model.context_parallel_size={model.context_parallel_size} does not work on a CPU: "
            "attention over a split sequence needs TransformerEngine; set it to 1"
        )
    optimizer = model.get("optim") or {}
    if optimizer.get("name") == "distributed_fused_adam":
        raise LayoutError(
            "model.optim.name=distributed_fused_adam is apex's, which has no CPU version; set "
            "mcore_distributed_optim, Megatron-core's own distributed optimizer"
        )


def _quiet() -> None:
    """Silence NeMo's hundred lines of warnings about Megatron options that it does not know."""
    import lightning.pytorch  # noqa: F401  (its import sets the levels that this function changes)
    from nemo.utils import logging as nemo_logging

    nemo_logging.setLevel(nemo_logging.ERROR)
    for name in ("lightning.pytorch", "lightning.fabric", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # When NeMo builds its helper, make would print that there is nothing to do.
    os.environ.setdefault("GNUMAKEFLAGS", "--silent --no-print-directory")


def build_trainer(cfg: DictConfig, callbacks: list[Callback] | None = None) -> Trainer:
    """Build Lightning's trainer as NeMo's own fine-tuning script does."""
    from nemo_kd.nemo.progress_bar import TrainerBuilder

    data_parallel_size(cfg)
    return TrainerBuilder(cfg).create_trainer(callbacks)


def start_process_groups(model_cfg: DictConfig, trainer: Trainer) -> None:
    """Start process groups and set seeds, which NeMo leaves to `Trainer.fit`, before a restore."""
    from megatron.core import tensor_parallel
    from nemo.collections.nlp.modules.common.megatron.megatron_init import (
        initialize_model_parallel_for_nemo,
    )

    initialize_model_parallel_for_nemo(
        world_size=trainer.world_size,
        global_rank=trainer.global_rank,
        local_rank=trainer.local_rank,
        pipeline_model_parallel_split_rank=None,
        **group_settings(model_cfg),
    )
    if trainer.strategy.launcher is not None:
        trainer.strategy.launcher.launch(lambda: None, trainer=trainer)
    trainer.strategy.setup_environment()
    tensor_parallel.model_parallel_cuda_manual_seed(model_cfg.seed)


def checkpoint_config(path: str | Path, model_class: type[Model], trainer: Trainer) -> DictConfig:
    """Return the model configuration inside a `.nemo` (file or unpacked directory)."""
    if not Path(path).exists():
        raise NemoKDError(
            f"no checkpoint at {path}; set model.restore_from_path to a .nemo file "
            "(examples/convert_hf_to_nemo.py makes one from a Hugging Face checkpoint)"
        )
    refuse_adapters_only(str(path))
    return model_class.restore_from(
        str(path), return_config=True, trainer=trainer, save_restore_connector=_connector(path)
    )


def restore(path: str | Path, model_class: type[Model], cfg: DictConfig, trainer: Trainer) -> Model:
    """Restore a `.nemo` as `model_class`; `cfg.model` overrides keys of the checkpoint."""
    merged = checkpoint_config(path, model_class, trainer)
    resolve_tokenizer(merged, path)
    overrides = OmegaConf.to_container(cfg.model, resolve=True)
    with open_dict(merged):
        for key, value in overrides.items():  # type: ignore[union-attr]
            merged[key] = value
        for key in DEFAULTS.keys() & set(merged) - set(overrides):  # type: ignore[arg-type]
            merged[key] = DEFAULTS[key]  # of this job, not of the checkpoint's
        if "optim" not in overrides:  # type: ignore[operator]
            # Not trained: some optimizers of a checkpoint change how NeMo builds the model.
            merged.optim = {"name": "adamw"}
        merged.precision = cfg.trainer.precision
        merged.target = f"{model_class.__module__}.{model_class.__qualname__}"
    model = model_class.restore_from(
        str(path),
        override_config_path=merged,
        trainer=trainer,
        save_restore_connector=_connector(path),
    )
    _check_rows(Path(path), model)
    return model


def _check_rows(path: Path, model: Any) -> None:
    """Refuse a tokenizer with ids beyond the checkpoint's embedding: NeMo leaves them as they are.

    Megatron silently loads an embedding of another size, since its padding may differ.
    """
    files = files_of(path, WEIGHTS)
    if METADATA not in files:
        return
    shape = DistributedCheckpoint(str(path), files).shapes.get(EMBEDDING)
    if shape is not None and shape[0] < model.tokenizer.vocab_size:
        raise NemoKDError(
            f"{path}: the tokenizer's largest id is {model.tokenizer.vocab_size - 1}, but the "
            f"embedding has {shape[0]} rows: the tokenizer is another model's, or the conversion "
            "cut the rows beyond a gap of the ids; convert the checkpoint again"
        )


def _connector(path: str | Path) -> Any:
    from nemo.collections.nlp.parts.nlp_overrides import NLPSaveRestoreConnector

    connector = NLPSaveRestoreConnector()
    if Path(path).is_dir():
        connector.model_extracted_dir = str(path)
    return connector
