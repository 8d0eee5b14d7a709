"""A recipe of Megatron-Bridge for distillation from stores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.bridge import AutoBridge
from megatron.bridge.training.config import (
    CheckpointConfig,
    ConfigContainer,
    DistributedDataParallelConfig,
    LoggerConfig,
    OptimizerConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainingConfig,
)

from nemo_kd.bridge import cpu
from nemo_kd.bridge.data import KDDataConfig, KDSource
from nemo_kd.teacher.processes import say_once

Sources = Sequence[str | Path | KDSource]


def finetune_config(
    student: str | Path,
    train: Sources,
    *,
    output: str | Path,
    valid: Sources = (),
    seq_length: int = 2048,
    temperature: float = 1.0,
    micro_batch_size: int = 1,
    global_batch_size: int = 32,
    train_iters: int = 1000,
    lr: float = 1e-5,
    min_lr: float = 0.0,
    lr_warmup_iters: int = 50,
    eval_interval: int = 100,
    save_interval: int = 100,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: int | None = None,
    context_parallel_size: int = 1,
    sequence_parallel: bool = False,
    precision: str | None = "bf16_mixed",
    moe_aux_loss_coeff: float = 0.0,
    seed: int = 1234,
) -> ConfigContainer:
    """Return the settings of a distillation, to be changed where needed and given to `finetune`.

    `student`: Hugging Face directory; Bridge loads its weights at the start, unless `output` has a
    checkpoint to continue from. `train`, `valid`: stores; SFT files as `KDSource(file=...)`.
    `output`: directory for `checkpoints` and `tensorboard`. `precision`: one of Bridge's
    `mixed_precision`; None: float32. `moe_aux_loss_coeff`: weight of the loss that balances a
    student's experts, instead of the weight in Bridge; padding counts in that loss.
    """
    config = ConfigContainer(
        model=_student(student, precision, moe_aux_loss_coeff),
        train=TrainingConfig(
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            train_iters=train_iters,
        ),
        optimizer=OptimizerConfig(
            optimizer="adam",
            lr=lr,
            min_lr=min_lr,
            weight_decay=0.0,
            adam_beta2=0.98,
            clip_grad=1.0,
            use_distributed_optimizer=True,
        ),
        scheduler=SchedulerConfig(
            lr_decay_style="cosine",
            lr_warmup_iters=lr_warmup_iters,
            start_weight_decay=0.0,
            end_weight_decay=0.0,
        ),
        ddp=DistributedDataParallelConfig(
            use_distributed_optimizer=True, grad_reduce_in_fp32=True, check_for_nan_in_grad=True
        ),
        dataset=KDDataConfig(
            train=_sources(train),
            valid=_sources(valid),
            student=str(student),
            seq_length=seq_length,
            temperature=temperature,
            seed=seed,
        ),
        logger=LoggerConfig(log_interval=1, tensorboard_dir=str(Path(output, "tensorboard"))),
        tokenizer=TokenizerConfig(
            tokenizer_type="HuggingFaceTokenizer",
            tokenizer_model=str(student),
            hf_tokenizer_kwargs={"use_fast": True},
        ),
        checkpoint=CheckpointConfig(
            save=str(Path(output, "checkpoints")),
            load=str(Path(output, "checkpoints")),
            save_interval=save_interval,
        ),
        mixed_precision=precision,
    )
    config.rng.seed = seed
    evaluation = evaluation_of(config)
    evaluation.eval_interval = eval_interval
    evaluation.eval_iters = 0  # set by `finetune`: as many as the validation data need
    model = config.model
    model.seq_length = seq_length
    model.tensor_model_parallel_size = tensor_model_parallel_size
    model.pipeline_model_parallel_size = pipeline_model_parallel_size
    model.virtual_pipeline_model_parallel_size = virtual_pipeline_model_parallel_size
    model.context_parallel_size = context_parallel_size
    model.sequence_parallel = sequence_parallel
    if not torch.cuda.is_available():
        cpu.adapt(config)
    return config


def evaluation_of(config: ConfigContainer) -> Any:
    """Return the block with the settings of evaluations: `validation`, or `train` before 0.4."""
    return getattr(config, "validation", config.train)


def _student(path: str | Path, precision: str | None, moe_aux_loss_coeff: float) -> Any:
    """Return Bridge's provider of the model in a Hugging Face directory, weights included."""
    provider = provider_of(path)
    _balance_experts(provider, moe_aux_loss_coeff)
    # An answer token has the same weight in every micro-batch.
    provider.calculate_per_token_loss = True
    if precision is None:
        provider.bf16 = provider.fp16 = False
        provider.params_dtype = provider.pipeline_dtype = torch.float32
    return provider


def _balance_experts(provider: Any, coefficient: float) -> None:
    """Set the weight of the experts' auxiliary loss, if the student has experts.

    With `calculate_per_token_loss` Megatron multiplies that loss by all tokens of a micro-batch and
    divides by its answer tokens: its gradient grows with the padding to `seq_length`.
    """
    if not getattr(provider, "num_moe_experts", None):
        return
    own = getattr(provider, "moe_aux_loss_coeff", 0.0)
    provider.moe_aux_loss_coeff = coefficient
    if own and not coefficient:
        say_once(
            [
                f"the student's moe_aux_loss_coeff={own} is set to 0: the loss that balances its "
                "experts would count padding; finetune_config(moe_aux_loss_coeff=...) sets it"
            ]
        )
    if coefficient:
        say_once(
            [
                f"moe_aux_loss_coeff={coefficient}: the loss that balances the experts counts "
                "padding, and grows with seq_length; packs have the least"
            ]
        )


def provider_of(path: str | Path) -> Any:
    """Return Bridge's provider of the model in a local Hugging Face directory.

    Nothing is downloaded, and no code of the directory is run.
    """
    bridge = AutoBridge.from_hf_pretrained(
        str(path), local_files_only=True, trust_remote_code=False
    )
    provider = bridge.to_megatron_provider()
    # Bridge skips the initialization, in which Megatron-core's own layers also mark their weights
    # as tensor-parallel: the gradient norm, hence clipping, would miss the ranks above 0.
    provider.perform_initialization = True
    return provider


def _sources(given: Sources) -> list[KDSource]:
    return [each if isinstance(each, KDSource) else KDSource(path=str(each)) for each in given]
