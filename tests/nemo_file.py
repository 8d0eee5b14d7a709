"""NeMo's own configuration of a fine-tuning, for tests that give it to the product's scripts.

NeMo's wheel does not have its examples. In NVIDIA's container the file itself is taken; elsewhere
a configuration of the same keys and defaults: `conf/train_gpt_sft_kd.yaml`, which is grown from
that file, without what is ours and with what differs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from tests.conftest import ROOT

NAME = "megatron_gpt_finetuning_config"
NEMOS = Path("/opt/NeMo/examples/nlp/language_modeling/tuning/conf") / f"{NAME}.yaml"

CHECKPOINTS = "exp_manager.checkpoint_callback_params"
OURS = (
    *("hydra", "defaults", "resume", "model.kd", "model.context_parallel_size"),
    *(f"trainer.{key}" for key in ("limit_val_batches", "num_sanity_val_steps", "benchmark")),
    *(f"trainer.{key}" for key in ("enable_model_summary", "enable_progress_bar")),
    "exp_manager.create_tensorboard_logger",
    "exp_manager.log_tflops_per_sec_per_gpu",
    "model.data.validation_drop_last",
    *(
        f"model.data.{split}.{key}"
        for split in ("train_ds", "validation_ds")
        for key in ("store", "over_long")
    ),
    *(f"model.data.train_ds.{key}" for key in ("alpha", "packed_sequence", "shuffle_seed")),
)
DIFFERENT: dict[str, Any] = {
    "name": "megatron_gpt_peft_${model.peft.peft_scheme}_tuning",
    **{
        f"model.data.train_ds.{key}": value
        for key, value in {
            "label_key": "output",
            "add_eos": True,
            "add_sep": False,
            "add_bos": False,
            "truncation_field": "input",
            "truncation_method": "right",
            "prompt_template": "{input} {output}",
        }.items()
    },
    "model.data.validation_ds.truncation_method": "right",
    "model.answer_only_loss": True,
    "trainer.devices": 1,
    "trainer.precision": 16,
    "trainer.max_steps": 20000,
    "trainer.val_check_interval": 200,
    f"{CHECKPOINTS}.monitor": "validation_${model.data.validation_ds.metric.name}",
    f"{CHECKPOINTS}.filename": "${name}--{${exp_manager.checkpoint_callback_params.monitor}:.3f}"
    "-{step}-{consumed_samples}",
    f"{CHECKPOINTS}.save_best_model": True,
    "exp_manager.create_early_stopping_callback": True,
    "model.resume_from_checkpoint": None,
    "model.sync_batch_comm": False,
    "model.fsdp": False,
    "model.fsdp_sharding_strategy": "full",
    "model.fsdp_grad_reduce_dtype": "fp32",
    "model.fsdp_sharded_checkpoint": False,
    "model.fsdp_use_orig_params": False,
    "model.peft.peft_scheme": "adapter",
    "model.peft.adapter_tuning.norm_type": "mixedfusedlayernorm",
    "model.peft.p_tuning": {
        "virtual_tokens": 10,
        "bottleneck_dim": 1024,
        "embedding_dim": 1024,
        "init_std": 0.023,
    },
    "model.peft.selective_tuning": {
        "tunable_base_param_names": ["self_attention", "word_embeddings"]
    },
    "model.data.train_ds.file_names": "???",
    "model.data.train_ds.memmap_workers": 2,
    "model.data.validation_ds.file_names": "???",
    "model.data.validation_ds.max_seq_length": 2048,
    "model.data.validation_ds.tokens_to_generate": 32,
}


def configuration() -> DictConfig:
    """The file's configuration, with its interpolations as they stand there."""
    if NEMOS.is_file():
        cfg = OmegaConf.load(NEMOS)
        assert isinstance(cfg, DictConfig)
        return cfg
    plain: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "conf/train_gpt_sft_kd.yaml"))
    for key in OURS:
        block, name = _at(plain, key)
        block.pop(name, None)
    for key, value in DIFFERENT.items():
        block, name = _at(plain, key)
        block[name] = value
    data = plain["model"]["data"]
    data["test_ds"] = {**data["validation_ds"], "file_names": None}
    return OmegaConf.create(plain)


def _at(configuration: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The block that a dotted key stands in, and its name there."""
    *blocks, name = key.split(".")
    for block in blocks:
        configuration = configuration[block]
    return configuration, name


def write(directory: Path) -> Path:
    """`NAME.yaml` in the directory, which is returned."""
    OmegaConf.save(configuration(), directory / f"{NAME}.yaml")
    return directory
