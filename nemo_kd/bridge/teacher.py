"""A teacher that Megatron-Bridge loads from a Hugging Face directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from nemo_kd.bridge import cpu
from nemo_kd.bridge.recipe import provider_of
from nemo_kd.errors import NemoKDError
from nemo_kd.mcore.layout import layout
from nemo_kd.mcore.teacher import TopKForward
from nemo_kd.mcore.writer import MegatronWriter
from nemo_kd.sft.tokenizer import HFTokenizer
from nemo_kd.store import StoreSpec
from nemo_kd.teacher import processes
from nemo_kd.teacher.config import DumpConfig
from nemo_kd.teacher.generation.step import Decoding

DTYPES = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}
"""Dtype of weights and computation, by the part of `trainer.precision` before the dash."""


class BridgeTeacher:
    """A `teacher.interface.Teacher` on any tensor, pipeline and sequence layout."""

    sep_id = 49704  # NeMo's default, so that rows have the same tokens as with a NeMo teacher
    virtual_tokens = 0
    identity = None

    def __init__(self, model: Any, provider: Any, path: Path) -> None:
        self.model, self.layout = model, layout()
        self.tokenizer = HFTokenizer(path)
        self.tokenizer_origin = {"library": "huggingface", "path": str(path.absolute())}
        learned = provider.position_embedding_type == "learned_absolute"
        self.max_positions: int | None = provider.seq_length if learned else None

    def regime(self, positions: int) -> int:
        return 0

    def forward(self, spec: StoreSpec, rows_per_lm_head: int) -> TopKForward:
        return TopKForward(self.model, spec, self.layout, rows_per_lm_head)

    def writer(self, spec: StoreSpec, decoding: Decoding) -> MegatronWriter:
        return MegatronWriter(self.model, spec, self.layout, decoding)


def load_teacher(config: DumpConfig) -> BridgeTeacher:
    """Load the Hugging Face directory `model.restore_from_path` by Bridge, in `trainer.precision`.

    Starts the process groups of the layout in `model`, over the processes that were launched.

    Errors: NemoKDError for a layout that the processes do not allow.
    """
    provider = provider_of(config.model.checkpoint)
    _set(provider, config)
    _start(provider)
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False)
    model.eval().requires_grad_(False)
    return BridgeTeacher(model, provider, config.model.checkpoint)


def _set(provider: Any, config: DumpConfig) -> None:
    dtype = DTYPES[str(config.trainer.precision).partition("-")[0]]
    provider.bf16, provider.fp16 = dtype == torch.bfloat16, dtype == torch.float16
    provider.params_dtype = provider.pipeline_dtype = dtype
    provider.tensor_model_parallel_size = config.model.tensor_model_parallel_size
    provider.pipeline_model_parallel_size = config.model.pipeline_model_parallel_size
    provider.sequence_parallel = config.model.sequence_parallel
    provider.hidden_dropout = provider.attention_dropout = 0.0
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
