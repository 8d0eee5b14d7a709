"""Settings of the block `model.kd`: those of the loss, its schedule and its normalization."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import DictConfig

from nemo_kd.loss import KDSchedule
from nemo_kd.loss.names import check_name
from nemo_kd.settings.dataclass import settings_of

NORMALIZATIONS = ("microbatch", "global_tokens")
NORMALIZATION_ALIASES = {
    "microbatch": "mb mean samples sample",
    "global_tokens": "tokens token pertoken globaltoken globalbatch global",
}


@dataclass(frozen=True)
class KDTrainingConfig(KDSchedule):
    """Settings of `model.kd`; see `KDConfig` for those of the loss."""

    normalize: str = "microbatch"
    """`microbatch`: mean over the answer tokens of each micro-batch, then over micro-batches and
    data-parallel ranks, as in NeMo's SFT. `global_tokens`: mean over all answer tokens of the
    global batch, so the result does not depend on how the batch is split."""
    fused_lm_head: bool = False
    """Compute LM head and loss together, in chunks of answer tokens: the logits of a complete
    micro-batch never exist, and prompt positions skip the LM head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("normalize", self.normalize, NORMALIZATIONS, NORMALIZATION_ALIASES)


def kd_training_config(block: DictConfig | None) -> KDTrainingConfig:
    """Convert `model.kd` to `KDTrainingConfig`.

    Errors: NemoKDError for an unknown key, naming the nearest valid one, and for a wrong value.
    """
    return settings_of(KDTrainingConfig, block, "model.kd")
