"""The keys that NeMo, Lightning and Megatron read in the blocks of NeMo's configurations.

Only keys whose values are checked are listed in this module. If a configuration has another key,
the known keys are read from the source of the installed packages.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from omegaconf import DictConfig

from nemo_kd.nemo.settings import sources
from nemo_kd.nemo.settings.optim import GPT_MODELS
from nemo_kd.settings.blocks import FREE, Block, Keys
from nemo_kd.settings.values import (
    ACCELERATOR,
    ANY,
    COUNT,
    DEVICES,
    FLAG,
    NATURAL,
    PATH,
    PRECISION,
    SHARE,
    TEXT,
    Kind,
    either,
    list_of,
    number,
    one_of,
    optional,
    whole,
)

STEPS = Kind("a whole number, at least 1, or -1", lambda v: v == -1 or COUNT.fits(v))

# --- trainer -----------------------------------------------------------------------------------

TRAINER = Block(
    {
        "devices": DEVICES,
        "num_nodes": COUNT,
        "accelerator": ACCELERATOR,
        "precision": PRECISION,
        "max_epochs": optional(STEPS),
        "max_steps": STEPS,
        "log_every_n_steps": COUNT,
        "val_check_interval": optional(either(COUNT, number(0, 1, above=True))),
        "limit_val_batches": optional(either(NATURAL, SHARE)),
        "gradient_clip_val": optional(number(0)),
        "gradient_clip_algorithm": optional(one_of("norm")),  # NeMo clips by no other
    },
    lambda block: {
        name: kind
        for name, kind in sources.parameters("lightning.pytorch.trainer.trainer", "Trainer").items()
        if name not in ("strategy", "plugins", "callbacks")  # set by NeMo's trainer builder
    },
)

# --- exp_manager -------------------------------------------------------------------------------

MANAGER = "nemo.utils.exp_manager"


def _manager_keys(block: DictConfig) -> Keys:
    return data_class(MANAGER, "ExpManagerConfig")


@cache
def data_class(module: str, name: str) -> Mapping[str, Kind | Block]:
    """Return a dataclass's fields as keys; a field whose type is a dataclass of the same module is
    a block."""
    held = {
        key: Block(data_class(module, cls))
        for key, cls in sources.field_classes(module, name).items()
    }
    return {**sources.fields(module, name), **held}


def _held(name: str, **keys: Kind) -> Block:
    return Block(keys, lambda block: data_class(MANAGER, name))


EXP_MANAGER = Block(
    {
        "explicit_log_dir": optional(PATH),
        "exp_dir": optional(PATH),
        "name": optional(TEXT),
        "wandb_logger_kwargs": FREE,
        "mlflow_logger_kwargs": FREE,
        "dllogger_logger_kwargs": FREE,
        "clearml_logger_kwargs": FREE,
        "neptune_logger_kwargs": FREE,
        "summary_writer_kwargs": FREE,
        "checkpoint_callback_params": _held(
            "CallbackParams", save_top_k=whole(-1), mode=one_of("min", "max")
        ),
        "early_stopping_callback_params": _held(
            "EarlyStoppingParams", mode=one_of("min", "max"), patience=NATURAL
        ),
    },
    _manager_keys,
)

# --- model.peft --------------------------------------------------------------------------------

LAYERS = optional(list_of(COUNT))
ADAPTER = {
    "adapter_dim": COUNT,
    "adapter_dropout": SHARE,
    "column_init_method": one_of("xavier", "zero", "normal", "kaiming"),
    "row_init_method": one_of("xavier", "zero", "normal", "kaiming"),
    "layer_selection": LAYERS,
    "weight_tying": FLAG,
    "position_embedding_strategy": optional(TEXT),
}
PEFT = Block(
    {
        "peft_scheme": optional(TEXT),
        "restore_from_path": optional(PATH),
        "lora_tuning": Block(
            {
                **ADAPTER,
                "variant": one_of("nemo", "canonical"),
                "target_modules": list_of(TEXT),
                "alpha": optional(number()),
                "network_alpha": optional(number()),
                "dropout_position": one_of("pre", "post"),
                "a2a_experimental": FLAG,
            }
        ),
        "adapter_tuning": Block(
            {
                **ADAPTER,
                "type": one_of("parallel_adapter", "linear_adapter"),
                "norm_position": optional(one_of("pre", "post")),
                "norm_type": TEXT,
            }
        ),
        "ia3_tuning": Block({"layer_selection": LAYERS}),
        # Distillation refuses these schemes, but NeMo's configuration file has their blocks.
        "p_tuning": FREE,
        "selective_tuning": FREE,
        "mlp_head_tuning": FREE,
    }
)

# --- model -------------------------------------------------------------------------------------

READERS = (
    *GPT_MODELS,
    "nemo.collections.nlp.models.nlp_model",
    "nemo.collections.nlp.parts.megatron_trainer_builder",
    "nemo.collections.nlp.parts.mixins.nlp_adapter_mixins",
    "nemo.core.classes.modelPT",
)
NOT_A_MODELS = (
    "trainer exp_manager model cluster_type name data train_ds validation_ds test_ds drop_last "
    "enable_progress_bar tunable_base_param_names weight_tying child_model setter nemo_version "
    "tokenizer_name tokenizer_model special_tokens vocab_file language_model mcore_bert sharp "
    "_cpu_offloading_context"
)
"""Names that the source search finds, but that are read from other blocks or by other models."""
PROFILES = ("nsys_profile", "memory_profile", "chakra_profile")
IN_NEMOS_FILES = ("resume_from_checkpoint", "sync_batch_comm", "pre_process", "post_process")
"""Keys of NeMo's own configurations that its code no longer reads."""


@cache
def model_keys() -> Mapping[str, Kind | Block]:
    """Return every key that NeMo's GPT models or Megatron's transformer configuration reads."""
    names = set(sources.keys_read(READERS, r"(?:self\.|model\.)?_?cfg(?:\.model)?"))
    names |= set(
        sources.fields("megatron.core.transformer.transformer_config", "TransformerConfig")
    )
    names |= set(sources.fields("megatron.core.model_parallel_config", "ModelParallelConfig"))
    names |= set(IN_NEMOS_FILES)
    known: dict[str, Kind | Block] = {
        name: ANY for name in sorted(names - set(NOT_A_MODELS.split()))
    }
    for name in PROFILES:
        read = sources.keys_read(READERS, rf"self\._?cfg\.{name}")
        known[name] = Block(dict.fromkeys(read, ANY))
    return known


def tokenizer_keys(block: DictConfig) -> Keys:
    return dict.fromkeys(sources.keys_read(GPT_MODELS, r"self\._?cfg\.tokenizer"), ANY)


CHECKPOINTING = {
    "activations_checkpoint_granularity": optional(one_of("selective", "full")),
    "activations_checkpoint_method": optional(one_of("uniform", "block")),
    "activations_checkpoint_num_layers": optional(NATURAL),
    "activations_checkpoint_layers_per_pipeline": optional(NATURAL),
}
MODEL: dict[str, Kind | Block] = {
    "seed": NATURAL,
    "restore_from_path": PATH,
    "tensor_model_parallel_size": COUNT,
    "pipeline_model_parallel_size": COUNT,
    "context_parallel_size": COUNT,
    "expert_model_parallel_size": COUNT,
    "use_tp_pp_dp_mapping": FLAG,
    "pipeline_model_parallel_comm_backend": optional(one_of("nccl", "ucc")),
    "pipeline_model_parallel_split_rank": Kind(
        "null or 0: a GPT has no encoder", lambda v: v in (None, 0)
    ),
    "sequence_parallel": FLAG,
    "global_batch_size": COUNT,
    "micro_batch_size": COUNT,
    "megatron_amp_O2": FLAG,
    "answer_only_loss": optional(FLAG),
    "hidden_dropout": SHARE,
    "attention_dropout": SHARE,
    "ffn_dropout": SHARE,
    "gradient_as_bucket_view": FLAG,
    "rampup_batch_size": Kind("null: NeMo's SFT has one batch size", lambda v: v is None),
    "save_nemo_on_validation_end": FLAG,
    "tokenizer": Block({}, tokenizer_keys),
    **CHECKPOINTING,
}
"""Keys of the block `model` that all scripts share."""
