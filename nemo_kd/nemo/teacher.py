"""Use a NeMo model as a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_kd.mcore.layout import layout
from nemo_kd.mcore.teacher import TopKForward
from nemo_kd.mcore.writer import MegatronWriter
from nemo_kd.nemo import cpu, start
from nemo_kd.nemo.families import check_length
from nemo_kd.nemo.positions import max_positions
from nemo_kd.nemo.vocabulary import SFTModel
from nemo_kd.store import StoreSpec
from nemo_kd.teacher.config import TeacherModelConfig
from nemo_kd.teacher.identity import teacher_identity

if TYPE_CHECKING:
    from nemo_kd.teacher.generation.step import Decoding

NOT_A_TRAINING = dict.fromkeys(
    ("logger", "enable_checkpointing", "use_distributed_sampler", "enable_progress_bar"), False
)
NOT_TRAINED = {
    "seed": 1234,
    "context_parallel_size": 1,
    "gradient_as_bucket_view": False,
    "activations_checkpoint_granularity": None,
    "activations_checkpoint_method": None,
    "activations_checkpoint_num_layers": None,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
"""Overrides of the checkpoint's settings for its own training."""
LOGITS_UNCHANGED = {
    # The layout, or recorded: as fingerprint, `template`, or `weights` (`teacher_identity`).
    *(field.name for field in fields(TeacherModelConfig)),
    *NOT_TRAINED,
    *(key.removeprefix("model.") for key in cpu.cpu_settings()),  # kernels, not arithmetic
    *("global_batch_size", "ffn_dropout", "tokenizer", "data", "optim", "kd"),
    *("virtual_pipeline_model_parallel_size", "expert_model_parallel_size", "rampup_batch_size"),
    *("resume_from_checkpoint", "sync_batch_comm", "nsys_profile", "memory_profile"),
    *("use_tp_pp_dp_mapping", "pipeline_model_parallel_comm_backend", "use_te_rng_tracker"),
    *("chakra_profile", "num_micro_batches_with_partial_activation_checkpoints"),
    *("activations_checkpoint_layers_per_pipeline", "cpu_offloading", "peft"),
}
"""Keys of `model` that do not enter `spec.teacher`; the others may change the logits."""


class NemoTeacher:
    """A `teacher.interface.Teacher` of a NeMo model, on any tensor and pipeline layout."""

    def __init__(self, model: SFTModel, identity: Mapping[str, Any] | None = None) -> None:
        self.model: Any = model
        self.identity = identity
        self.layout = layout()
        self.tokenizer = model.tokenizer
        tokenizer = model.cfg.tokenizer
        self.tokenizer_origin = {
            "library": tokenizer.library,
            # A tokenizer inside the .nemo is unpacked to a new path at each start: not recorded.
            "path": tokenizer.get("type"),
        }
        self.sep_id, self.virtual_tokens = model.sep_id, model.virtual_tokens
        self.max_positions = max_positions(model.cfg)

    def regime(self, positions: int) -> int:
        return 0

    def forward(self, spec: StoreSpec, rows_per_lm_head: int) -> TopKForward:
        return TopKForward(self.model.model, spec, self.layout, rows_per_lm_head)

    def writer(self, spec: StoreSpec, decoding: Decoding) -> MegatronWriter:
        return MegatronWriter(self.model.model, spec, self.layout, decoding)


def load_teacher(cfg: DictConfig) -> NemoTeacher:
    """Load the .nemo at `model.restore_from_path`, and start the process groups of its layout."""
    identity = _identity(cfg)
    _complete(cfg)
    trainer = start.build_trainer(cfg)
    start.start_process_groups(cfg.model, trainer)
    model = start.restore(cfg.model.restore_from_path, SFTModel, cfg, trainer)
    check_length(model.cfg, cfg.data.max_seq_length, "data")
    model.freeze()
    return NemoTeacher(model.to(torch.cuda.current_device()), identity)


def _identity(cfg: DictConfig) -> dict[str, Any] | None:
    """Return `teacher` of the store's spec where `model` overrides the checkpoint; None elsewhere.

    `cfg.model` has, besides the keys of a dump, only those that the user has given.
    """
    model: Any = OmegaConf.to_container(cfg.model, resolve=True)
    given = {key: value for key, value in model.items() if key not in LOGITS_UNCHANGED}
    if not given:
        return None
    return {**teacher_identity(cfg, Path(cfg.model.restore_from_path)), "model": given}


def _complete(cfg: DictConfig) -> None:
    """Add keys that NeMo's trainer and model read although a dump does not use them."""
    model_parallel = cfg.model.tensor_model_parallel_size * cfg.model.pipeline_model_parallel_size
    replicas = max(cfg.trainer.devices * cfg.trainer.num_nodes // model_parallel, 1)
    with open_dict(cfg):
        cfg.model.global_batch_size = cfg.model.micro_batch_size * replicas
        cfg.model.optim = {"name": "adamw" if cfg.trainer.accelerator == "cpu" else "fused_adam"}
        cfg.trainer = OmegaConf.merge(NOT_A_TRAINING, cfg.trainer)
        cfg.model = OmegaConf.merge(NOT_TRAINED, cfg.model)
        loss = {"metric": {"name": "loss"}}
        data = {"chat": cfg.data.chat, "validation_ds": loss, "test_ds": loss}
        cfg.model.data = OmegaConf.create(data)
        cfg.exp_manager = None
