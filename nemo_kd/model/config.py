"""`model.kd` of a training run: the loss's own settings and what the model adds to them."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_kd.loss import KDConfig

NORMALIZATIONS = ("microbatch", "global_tokens")


@dataclass(frozen=True)
class KDTrainingConfig(KDConfig):
    """Settings of `model.kd`; see `KDConfig` for those of the loss."""

    normalize: str = "microbatch"
    """`microbatch`: mean over the answer tokens of each micro-batch, then over micro-batches and
    data-parallel ranks, as NeMo's SFT. `global_tokens`: mean over all answer tokens of the global
    batch, so the result does not depend on how the batch is split."""
    fused_lm_head: bool = False
    """Compute the LM head with the loss, in chunks of answer tokens: the logits of a whole
    micro-batch never exist, and prompt positions do not go through the LM head at all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalize not in NORMALIZATIONS:
            raise ValueError(
                f"model.kd.normalize={self.normalize!r} is unknown; "
                f"choose one of {', '.join(NORMALIZATIONS)}"
            )


def kd_training_config(block: DictConfig | None) -> KDTrainingConfig:
    """`model.kd` → `KDTrainingConfig`; an unknown key is an error with the nearest valid name."""
    values: Any = {} if block is None else OmegaConf.to_container(block, resolve=True)
    known = [field.name for field in dataclasses.fields(KDTrainingConfig)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean model.kd.{near[0]}? " if near else ""
            raise ValueError(f"model.kd.{key} is unknown; {hint}Known: {', '.join(known)}")
    return KDTrainingConfig(**values)


def store_directories(data_cfg: DictConfig) -> list[str]:
    """The stores that a training or validation block names: none, one, or a list."""
    stores = data_cfg.get("store") or []
    return [stores] if isinstance(stores, str) else [str(store) for store in stores]
