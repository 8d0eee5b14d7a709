"""Keys of a dump's configuration that NeMo reads, besides those of `teacher.config`."""

from __future__ import annotations

from nemo_kd.nemo.settings import keys as nemo
from nemo_kd.settings.blocks import Block
from nemo_kd.settings.values import Kind

NOT_A_DUMPS = (
    "optim",
    "data",
    "peft",
    "kd",
    "global_batch_size",
    "gradient_as_bucket_view",
    "save_nemo_on_validation_end",
    "context_parallel_size",
)
EXPERTS = Kind(
    "1: every rank of a dump holds all experts; split the teacher with "
    "model.tensor_model_parallel_size and model.pipeline_model_parallel_size",
    lambda v: v == 1,
)
BLOCKS = {
    "trainer": nemo.TRAINER,
    "model": Block(
        {key: kind for key, kind in nemo.MODEL.items() if key not in NOT_A_DUMPS}
        | {"expert_model_parallel_size": EXPERTS},
        lambda block: {k: v for k, v in nemo.model_keys().items() if k not in NOT_A_DUMPS},
    ),
}
"""Block → the keys that NeMo, Lightning and Megatron read in it."""
