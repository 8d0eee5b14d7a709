"""Check the configurations for training, evaluating and merging: NeMo's keys and our own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_kd.checkpoints.distributed import COMMON
from nemo_kd.nemo.config import KDTrainingConfig
from nemo_kd.nemo.run_directory import paths_of
from nemo_kd.nemo.settings import keys as nemo
from nemo_kd.nemo.settings.chosen import fit_optim
from nemo_kd.nemo.settings.optim import OPTIM
from nemo_kd.nemo.splits import SPLITS, ResumeConfig, TrainSplit, ValidationSplit
from nemo_kd.nemo.template import OF_SPLITS
from nemo_kd.settings import files
from nemo_kd.settings.batches import check_batches, check_processes
from nemo_kd.settings.blocks import FREE, Block, check
from nemo_kd.settings.dataclass import block_of
from nemo_kd.settings.moved import TRAINING
from nemo_kd.settings.templates import check_template
from nemo_kd.settings.values import (
    COUNT,
    FLAG,
    NATURAL,
    PATH,
    TEXT,
    Kind,
    list_of,
    optional,
)
from nemo_kd.sft.config import RowConfig
from nemo_kd.sft.previews import first_rows, problem_of


def _optional(kind: Kind | Block) -> Kind | Block:
    return optional(kind) if isinstance(kind, Kind) else kind


NEMOS: dict[str, Kind | Block] = {  # read by NeMo's `_build_dataset` and `build_data_loader`
    "global_batch_size": COUNT,
    "micro_batch_size": COUNT,
    "seed": NATURAL,
    "num_workers": NATURAL,
    "memmap_workers": optional(COUNT),
    "pin_memory": FLAG,
    "max_seq_length": COUNT,
    "min_seq_length": COUNT,
    "drop_last": FLAG,
    "index_mapping_dir": optional(PATH),
    "global_sample_mapping": FLAG,
    "hf_dataset": FLAG,
    "pad_to_max_length": FLAG,
    "ceil_to_power_2": FLAG,
    "get_attention_mask_from_fusion": FLAG,
    "packed_sequence_return_cu_seqlen": FLAG,
    "tokens_to_generate": NATURAL,
    "sample_weight": optional(TEXT),
    # Null takes the stores' setting.
    **{key: _optional(block_of(RowConfig).keys[key]) for key in OF_SPLITS},
}
METRIC = Block(
    {
        "name": optional(TEXT),
        "average": optional(TEXT),
        "num_classes": optional(COUNT),
        "labels_are_strings": FLAG,
        "class_labels": optional(list_of(TEXT)),
        "label_key": TEXT,
    }
)
TRAIN_SPLIT = {**block_of(TrainSplit).keys, **NEMOS}
VALIDATION_SPLIT = {
    **block_of(ValidationSplit).keys,
    **NEMOS,
    "metric": METRIC,
    "write_predictions_to_file": FLAG,
    "output_file_path_prefix": optional(TEXT),
}
TEST_SPLIT = {key: kind for key, kind in VALIDATION_SPLIT.items() if key != "store"}
DATA = Block(
    {
        "train_ds": Block(TRAIN_SPLIT),
        "validation_ds": Block(VALIDATION_SPLIT),
        "test_ds": Block(TEST_SPLIT),
        "validation_drop_last": FLAG,
        "chat": optional(FLAG),
        "chat_prompt_tokens": FREE,
        "reset_position_ids": FLAG,
        "reset_attention_mask": FLAG,
        "eod_mask_loss": FLAG,
    }
)
TRAINING_BLOCK = Block(
    {
        "name": TEXT,
        "trainer": nemo.TRAINER,
        "exp_manager": nemo.EXP_MANAGER,
        "model": Block(
            nemo.MODEL
            | {
                "kd": block_of(KDTrainingConfig),
                "data": DATA,
                "peft": nemo.PEFT,
                "optim": OPTIM,
            },
            lambda block: nemo.model_keys(),
        ),
        "resume": block_of(ResumeConfig),
        "cluster_type": optional(TEXT),  # a key of NeMo, for its own clusters
    },
    moved=TRAINING,
)
OUTPUT_BLOCK = Block({**TRAINING_BLOCK.keys, "output": optional(PATH)}, moved=TRAINING)


def fill_in(cfg: DictConfig) -> None:
    """Add missing keys with their defaults, so that NeMo's own configurations work too.

    If there is a store, `file_names: ???` in NeMo's configuration file becomes null.
    """
    OmegaConf.set_struct(cfg, False)
    defaults = DEFAULTS if cfg.get("exp_manager") is None else DEFAULTS | OF_A_RUN
    for key, default in defaults.items():
        if OmegaConf.select(cfg, key, throw_on_missing=False) is None:
            OmegaConf.update(cfg, key, default, force_add=True)
    for split in SPLITS:
        data = cfg.model.data[split]
        if OmegaConf.is_missing(data, "file_names") and (data.store or split != "train_ds"):
            data.file_names = None


def check_keys(cfg: DictConfig) -> None:
    """Check that all keys are known and their values allowed, after `fit_optim`.

    Errors: NemoKDError for an unknown key or a value that is not allowed.
    """
    fit_optim(cfg.model)
    check(cfg, OUTPUT_BLOCK if "output" in set(cfg) else TRAINING_BLOCK)


def check_inputs(cfg: DictConfig) -> None:
    """Check that paths exist and that batch and parallel sizes divide evenly.

    Errors: NemoKDError if they do not.
    """
    files.check_files(cfg, FILES)
    check_processes(cfg)
    check_batches(cfg, tuple(SPLITS))


def check_templates(cfg: DictConfig) -> None:
    """Check the prompt templates against their blocks and the first row of each file.

    Errors: NemoKDError for a template that cannot work, or whose fields a file does not have.
    """
    if cfg.model.data.get("chat"):
        return
    for split in SPLITS:
        where = f"model.data.{split}"
        paths = files.paths_at(cfg, f"{where}.file_names")
        check_template(cfg.model.data[split], where, first_rows(list(paths)))


DEFAULTS: dict[str, Any] = {
    "exp_manager": None,
    "model.kd": {},
    "model.peft.peft_scheme": "none",
    "model.peft.restore_from_path": None,
    "model.data.train_ds.store": None,
    "model.data.train_ds.alpha": None,
    "model.data.validation_ds.store": None,
    "model.data.validation_ds.names": None,
    "model.data.validation_ds.metric.name": "loss",
    "model.data.validation_ds.metric.average": None,
    "model.data.validation_ds.metric.num_classes": None,
    "model.data.test_ds.file_names": None,
    "model.data.test_ds.metric.name": "loss",
    **{
        f"model.data.{split}.{key}": default
        for split in SPLITS
        for key, default in (("min_seq_length", 1), ("num_workers", 0), ("pin_memory", True))
    },
    "trainer.num_nodes": 1,
    "trainer.num_sanity_val_steps": 0,
    "trainer.logger": False,  # exp_manager creates the logger and the checkpoints
    "trainer.enable_checkpointing": False,
    "trainer.use_distributed_sampler": False,
    "trainer.benchmark": False,
    "trainer.enable_model_summary": False,
}
"""Defaults of keys that NeMo or Lightning needs and that a configuration may leave out."""
OF_A_RUN: dict[str, Any] = {
    "exp_manager.resume_ignore_no_checkpoint": True,
    "exp_manager.log_tflops_per_sec_per_gpu": False,  # NeMo does not compute it for fine-tuning
    "exp_manager.checkpoint_callback_params": {},
}
STORE = files.directory("store")
CHECKPOINT = files.file_or_directory(
    "checkpoint of a training",
    (COMMON,),
    "; give one of the run's directory `checkpoints`, or remove the setting: an earlier start of "
    "this command may have resumed from it and replaced it since",
)


def _checkpoint(path: str) -> str:
    """Require a checkpoint of a training: one of adapters may be the files of several ranks."""
    if path.endswith(".nemo"):
        return f"{path} is a model without the state of a training: expected a checkpoint"
    return "" if paths_of(Path(path)) and not os.path.isdir(path) else CHECKPOINT(path)


FILES = [
    (
        "model.restore_from_path",
        files.file_or_directory(
            "checkpoint",
            ("model_config.yaml",),
            "; set model.restore_from_path to a .nemo file (examples/convert_hf_to_nemo.py makes "
            "one from a Hugging Face checkpoint)",
        ),
    ),
    ("model.peft.restore_from_path", files.file_or_directory("file of adapters", ("",))),
    ("exp_manager.resume_from_checkpoint", _checkpoint),
    ("model.tokenizer.model", files.file("tokenizer model")),
    ("model.tokenizer.vocab_file", files.file("vocabulary")),
    ("model.tokenizer.merge_file", files.file("file of merges")),
    *((f"model.data.{split}.store", STORE) for split in SPLITS),
    *((f"model.data.{split}.file_names", problem_of) for split in (*SPLITS, "test_ds")),
    ("exp_manager.explicit_log_dir", files.output_directory),
    ("exp_manager.exp_dir", files.output_directory),
]
