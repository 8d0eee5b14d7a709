"""The parallel layout of a Megatron-core job, read from its process groups."""

from __future__ import annotations

import torch
from megatron.core import parallel_state

from nemo_kd.teacher.layout import Layout


def layout() -> Layout:
    """Return the layout of this job; call it after `initialize_model_parallel`."""
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    return Layout(
        rank=torch.distributed.get_rank(),
        size=torch.distributed.get_world_size(),
        replica=parallel_state.get_data_parallel_rank(),
        replicas=parallel_state.get_data_parallel_world_size(),
        writes=parallel_state.is_pipeline_last_stage() and tensor_rank == 0,
        stages=parallel_state.get_pipeline_model_parallel_world_size(),
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        replica_group=parallel_state.get_model_parallel_group(),
        device=torch.device(torch.cuda.current_device()),
    )
