"""A teacher that Megatron-Bridge loads from a Hugging Face directory."""

from __future__ import annotations

import os
from typing import Any

import torch

from nemo_kd.bridge import cpu
from nemo_kd.bridge.recipe import provider_of
from nemo_kd.errors import NemoKDError
from nemo_kd.mcore.loading import MegatronTeacher
from nemo_kd.sft.tokenizer import HFTokenizer
from nemo_kd.teacher import processes
from nemo_kd.teacher.config import DumpConfig
from nemo_kd.teacher.identity import teacher_identity
from nemo_kd.teacher.precision import dtype_of


def load_teacher(config: DumpConfig) -> MegatronTeacher:
    """Load the Hugging Face directory `model.restore_from_path` by Bridge, in `trainer.precision`.

    Starts the process groups of the layout in `model`, over the processes that were launched.

    Errors: NemoKDError for a layout that the processes do not allow.
    """
    provider = provider_of(config.model.checkpoint)
    _set(provider, config)
    _start(provider)
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False)
    model.eval().requires_grad_(False)
    path = config.model.checkpoint
    learned = provider.position_embedding_type == "learned_absolute"
    return MegatronTeacher(
        model,
        HFTokenizer(path),
        str(path.absolute()),
        max_positions=provider.seq_length if learned else None,
        identity=teacher_identity(config, path, kind="bridge"),
    )


def _set(provider: Any, config: DumpConfig) -> None:
    dtype = dtype_of(config)
    provider.bf16, provider.fp16 = dtype == torch.bfloat16, dtype == torch.float16
    provider.params_dtype = provider.pipeline_dtype = dtype
    provider.tensor_model_parallel_size = config.model.tensor_model_parallel_size
    provider.pipeline_model_parallel_size = config.model.pipeline_model_parallel_size
    provider.sequence_parallel = config.model.sequence_parallel
    provider.hidden_dropout = provider.attention_dropout = 0.0
    provider.mtp_num_layers = None  # further layers, on which the logits do not depend
    if not torch.cuda.is_available():
        cpu.adapt_model(provider)
    provider.finalize()


def _start(provider: Any) -> None:
    """Start the process groups of the provider's layout."""
    launch = processes.Launch.of(os.environ)
    ranks = provider.tensor_model_parallel_size * provider.pipeline_model_parallel_size
    if launch.size % ranks:
        raise NemoKDError(
            f"{launch.size} processes cannot be divided into models of {ranks}: start a multiple "
            "of tensor_model_parallel_size × pipeline_model_parallel_size processes"
        )
    processes.start(launch, expected=None)
    if not torch.distributed.is_initialized():  # a single process
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    provider.initialize_model_parallel(seed=0)
