"""Load a teacher into Megatron-core: its process groups, its model on any layout, its tokenizer."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel

from nemo_kd.errors import NemoKDError
from nemo_kd.mcore.gpt import build
from nemo_kd.mcore.layout import layout
from nemo_kd.mcore.sources import Opened, open_model
from nemo_kd.mcore.teacher import TopKForward
from nemo_kd.mcore.weights import load_weights
from nemo_kd.mcore.writer import MegatronWriter
from nemo_kd.settings.batches import processes_of
from nemo_kd.sft.reader import SEP_ID
from nemo_kd.sft.tokenizer import HFTokenizer
from nemo_kd.store import StoreSpec
from nemo_kd.teacher import processes
from nemo_kd.teacher.config import DumpConfig, TeacherModelConfig
from nemo_kd.teacher.generation.step import Decoding
from nemo_kd.teacher.identity import teacher_identity
from nemo_kd.teacher.layout import LayoutError
from nemo_kd.teacher.precision import dtype_of
from nemo_kd.teacher.rows import check_separator

SEED = 1234


class MegatronTeacher:
    """A `teacher.interface.Teacher` in Megatron-core, on any tensor and pipeline layout."""

    sep_id = SEP_ID
    virtual_tokens = 0

    def __init__(
        self,
        model: GPTModel,
        tokenizer: HFTokenizer,
        tokenizer_path: str | None,
        *,
        max_positions: int | None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.identity = model, identity
        self.layout = layout()
        self.tokenizer, self.max_positions = tokenizer, max_positions
        self.tokenizer_origin = {"library": "huggingface", "path": tokenizer_path}

    def regime(self, positions: int) -> int:
        return 0

    def forward(self, spec: StoreSpec, rows_per_lm_head: int) -> TopKForward:
        return TopKForward(self.model, spec, self.layout, rows_per_lm_head)

    def writer(self, spec: StoreSpec, decoding: Decoding) -> MegatronWriter:
        return MegatronWriter(self.model, spec, self.layout, decoding)


def load_teacher(config: DumpConfig) -> MegatronTeacher:
    """Load the checkpoint at `model.restore_from_path` on the layout of the block `model`.

    Errors: NemoKDError for a checkpoint, a layout or a precision that cannot be used.
    """
    if not os.environ.get("NEMO_KD_VERBOSE"):
        logging.getLogger("megatron").setLevel(logging.ERROR)
    _refuse(config)
    _start_process_groups(config)
    teacher = config.teacher
    opened = open_model(
        config.model.checkpoint, tokenizer=teacher.tokenizer, arguments=teacher.arguments
    )
    _check(opened, config)
    check_separator(config, opened.tokenizer)
    (model,) = build(
        opened.settings,
        vocab_size=opened.tokenizer.vocab_size,
        sequence_parallel=config.model.sequence_parallel,
        **_precision(config),
    )
    load_weights([model], opened.tensors)
    model = model.eval().requires_grad_(False)
    return MegatronTeacher(
        model,
        opened.tokenizer,
        opened.tokenizer_path,
        max_positions=opened.settings.max_positions,
        identity=_identity(opened, config),
    )


def _precision(config: DumpConfig) -> dict[str, Any]:
    """Return the fields of TransformerConfig for `trainer.precision`.

    The weights are float32 and the computation is cast, unless `megatron_amp_O2` casts them.
    """
    dtype = dtype_of(config)
    if dtype is torch.float32:
        return {"params_dtype": dtype}
    if config.model.megatron_amp_O2:
        name = "bf16" if dtype is torch.bfloat16 else "fp16"
        return {"params_dtype": dtype, name: True}
    return {"params_dtype": torch.float32, "enable_autocast": True, "autocast_dtype": dtype}


def _refuse(config: DumpConfig) -> None:
    """Raise LayoutError for settings that fail deep inside Megatron."""
    model = config.model
    if model.sequence_parallel and model.tensor_model_parallel_size == 1:
        raise LayoutError(
            "model.sequence_parallel=true needs model.tensor_model_parallel_size of 2 or more"
        )
    if torch.cuda.is_available():
        if config.trainer.accelerator == "cpu":
            raise LayoutError(
                "trainer.accelerator=cpu: Megatron-core uses the GPUs that it sees; hide them with "
                "CUDA_VISIBLE_DEVICES= to run on the CPU"
            )
    elif config.trainer.dtype_name == "16":
        raise LayoutError(
            f"trainer.precision={config.trainer.precision} does not work on a CPU; choose 32, bf16 "
            "or bf16-mixed"
        )


def _start_process_groups(config: DumpConfig) -> None:
    """Start the default process group and those of the layout, unless they exist."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # for overlapping communication
    launch = processes.Launch.of(os.environ)
    processes.start(
        launch,
        expected=processes_of(config.trainer.devices, config.trainer.num_nodes),
        accelerator=config.trainer.accelerator,
    )
    if not dist.is_initialized():  # a single process
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    tensor, pipeline = _sizes(config.model)
    if dist.get_world_size() % (tensor * pipeline):
        raise LayoutError(
            f"{dist.get_world_size()} processes cannot hold tensor × pipeline parallel size "
            f"{tensor * pipeline}; start a multiple of {tensor * pipeline} "
            "(torchrun --nproc_per_node)"
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor,
            pipeline,
            distributed_timeout_minutes=processes.LONGEST_WAIT // timedelta(minutes=1),
        )
        tensor_parallel.model_parallel_cuda_manual_seed(SEED)


def _sizes(model: TeacherModelConfig) -> tuple[int, int]:
    return model.tensor_model_parallel_size, model.pipeline_model_parallel_size


def _check(opened: Opened, config: DumpConfig) -> None:
    """Raise NemoKDError for a model that is another one for these rows or this tokenizer."""
    limit, length = opened.settings.limit(), config.data.max_seq_length
    if limit is not None and length > limit[0]:
        raise NemoKDError(
            f"data.max_seq_length={length}: beyond {limit[0]} tokens {limit[1]}, which "
            f"Megatron-core does not do here; set data.max_seq_length={limit[0]} or less"
        )
    name, size = opened.path, opened.tokenizer.vocab_size
    if opened.tokenizer.eos_id is None:
        raise NemoKDError(f"{name}: its tokenizer has no end-of-sequence token; SFT needs one")
    if opened.settings.vocab_size < size:
        raise NemoKDError(
            f"{name}: the tokenizer's largest id is {size - 1}, but the embedding has "
            f"{opened.settings.vocab_size} rows; they belong to different models"
        )


def _identity(opened: Opened, config: DumpConfig) -> dict[str, Any] | None:
    """Return `teacher` of the store's spec; None: that of the configured path."""
    path, arguments = opened.path, config.teacher.arguments
    if path == config.model.checkpoint and not arguments:
        return None
    # The last of several iterations: the directory above changes while the training runs.
    name = f"{path.parent.name}/{path.name}" if path != config.model.checkpoint else None
    identity = teacher_identity(config, path, name)
    return {**identity, "arguments": dict(arguments)} if arguments else identity
